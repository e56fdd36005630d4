"""Every error a user can cause; each says what was asked, what is possible and what to do.

RoundelError
├── FormatError    a format text, or numbers that a format cannot hold
├── InputError     a model, data or artifact file that cannot be read as what it claims to be
├── PlanError      a plan or an argument that does not fit the model
└── CheckError     a check that was asked for and missed (exit status 1 on the command line)
"""


class RoundelError(Exception):
    """Root of every error a user can cause; the command line prints its text and no traceback."""


class FormatError(RoundelError):
    """A format text that does not parse, or numbers that the format cannot hold."""


class InputError(RoundelError):
    """A model, data or artifact file that is missing, damaged, hostile or unsupported."""


class PlanError(RoundelError):
    """A plan or an argument that does not fit the model."""


class CheckError(RoundelError):
    """A check that was asked for and missed, such as a collapsed result under ``strict``."""
