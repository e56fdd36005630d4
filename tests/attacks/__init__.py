"""Small makers of hostile files; ``python -m attacks FOLDER`` (from tests/) writes them all, to try on any reader.

None does harm: what tries to run code only makes the file that ``canary`` names.
"""
