"""transformers architectures from their config alone: what it takes to build a network again, without its weights or any code
of a folder; reading folders is the readers' business."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import nn

from ..errors import InputError
from ..files import nearest

#: Keys of config.json that say where it came from or what may be downloaded; they decide nothing about the model.
IGNORED = ("_name_or_path", "auto_map", "custom_pipelines", "_commit_hash", "trust_remote_code")


def hf_config(module: nn.Module) -> dict[str, Any] | None:
    """What `huggingface_skeleton` needs to build ``module`` again: its whole config as plain JSON with the class under
    ``architectures``, no paths in it; None for a module that is no transformers model."""
    config: Any = getattr(module, "config", None)
    if not (hasattr(config, "to_json_string") and type(module).__module__.startswith("transformers.")):
        return None
    plain: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    dtype = next((str(p.dtype).removeprefix("torch.") for p in module.parameters() if p.is_floating_point()), "float32")
    return {k: v for k, v in plain.items() if k not in IGNORED} | {"architectures": [type(module).__name__], "dtype": dtype}


def huggingface_skeleton(config: Mapping[str, Any]) -> nn.Module:
    """The model that a config dict describes, with parameters on the meta device (no memory) and true buffers.

    Buffers (rotary frequencies, position ids) are small and computed, not stored, so they are made for real. The result is
    in evaluation mode and waits for its weights. Raises `InputError` as `read_folder` does for the config.
    """
    settings, cls = resolve(dict(config), "the stored config")
    before = torch.get_default_dtype()
    with quiet(), _meta_parameters():
        try:
            torch.set_default_dtype(getattr(torch, str(config.get("dtype") or "float32"), torch.float32))
            module: nn.Module = cls(settings)
        except misfit() as err:
            raise InputError(f"the stored config does not describe a {cls.__name__}: {first_line(err)}") from err
        finally:
            torch.set_default_dtype(before)
    return module.eval()


# -- transformers -----------------------------------------------------------------------------------------------------


def transformers_package() -> ModuleType:
    """The package, or an `InputError` that says how to install it."""
    try:
        import transformers
    except ImportError as err:
        raise InputError("a Hugging Face model needs the package transformers: pip install -e '.[hf]' in Roundel's folder") from err
    return transformers


def resolve(raw: dict[str, Any], where: str) -> tuple[Any, Any]:
    """(config object, model class) from a config's plain content; only classes of transformers itself."""
    transformers = transformers_package()
    kind, architectures = raw.get("model_type"), raw.get("architectures") or []
    known = transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES
    if not isinstance(kind, str) or kind not in known:
        code = " and brings code of its own (auto_map), which is never run" if "auto_map" in raw else ""
        raise InputError(
            f"{where}: model_type {kind!r} is not built into transformers{code}; the nearest there: {nearest(str(kind), known)}"
        )
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise InputError(f"{where}: 'architectures' is not a list of class names")
    plain = {key: value for key, value in raw.items() if key not in (*IGNORED, "model_type")}
    with quiet():
        try:
            config = transformers.AutoConfig.for_model(kind, **plain)
        except misfit() as err:
            raise InputError(f"{where}: config.json does not describe a {kind!r} model: {first_line(err)}") from err
    if not architectures:
        return config, transformers.MODEL_MAPPING[type(config)]
    cls: Any = getattr(transformers, architectures[0], None) if architectures[0].isidentifier() else None
    if not (
        isinstance(cls, type)
        and issubclass(cls, transformers.PreTrainedModel)
        and getattr(cls, "config_class", None) is type(config)
    ):
        raise InputError(f"{where}: {architectures[0]!r} is not a {kind!r} model of transformers {transformers.__version__}")
    return config, cls


def misfit() -> tuple[type[Exception], ...]:
    """What transformers raises for a config or weights that do not fit; its validators have a class of their own."""
    from huggingface_hub import errors

    own = getattr(errors, "StrictDataclassError", ValueError)
    return (own, ValueError, TypeError, LookupError, AttributeError, RuntimeError, ArithmeticError, OSError, ImportError)


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars, warnings or chatter of transformers inside; its settings are as before afterwards."""
    log = transformers_package().utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()


@contextmanager
def _meta_parameters() -> Iterator[None]:
    """Every parameter registered inside moves to the meta device at once, before anything fills it."""

    def to_meta(_module: nn.Module, _name: str, value: nn.Parameter | None) -> nn.Parameter | None:
        if value is None or value.device.type == "meta":
            return None  # as it is, so that tied parameters stay one
        return nn.Parameter(value.detach().to("meta"), requires_grad=value.requires_grad)

    hook = torch.nn.modules.module.register_module_parameter_registration_hook(to_meta)  # type: ignore[arg-type]
    try:
        yield
    finally:
        hook.remove()


def first_line(err: BaseException) -> str:
    """What an exception says first, short enough for one sentence of ours."""
    return (str(err).strip().splitlines() or [type(err).__name__])[0][:200]
