"""Stands in for a torchaudio whose wheel is of another torch: transformers asks for it by name and here nothing needs it."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

sys.modules["torchaudio"] = ModuleType("torchaudio")
sys.modules["torchaudio"].__spec__ = ModuleSpec("torchaudio", None)
