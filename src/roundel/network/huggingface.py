"""Temporary."""
from ..readers.huggingface import hf_config, huggingface_skeleton
__all__ = ["hf_config", "huggingface_skeleton"]
