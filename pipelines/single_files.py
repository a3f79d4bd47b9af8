"""Models in one file, read by diffusers itself: checkpoints of A1111, ComfyUI and Black Forest Labs, and GGUF."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.single_file_utils import fetch_diffusers_config, load_single_file_checkpoint
from safetensors import safe_open

from fastdiff.errors import BackendUnavailable, BadModel

from .parts import MAIN
from .sources import DTYPE, PICKLES, check_weights, first_line, source

# What only a file with more than a denoiser has.
_WHOLE = ("first_stage_model.", "cond_stage_model.", "conditioner.", "text_encoders.", "vae.")
_MISSING = re.compile(r"^(\w+) = (\w+)\.from_pretrained", re.M)  # in what diffusers says of a part that a file lacks


def is_file(model: str) -> bool:
    return Path(model).expanduser().is_file()


def read(file: Path, base: str | None, dtype: torch.dtype) -> Any:
    """A pipeline from one file.

    base: the directory or hub id of a pipeline of the same kind, for configuration and for parts that are not in the
    file. Default: the directory where the file lies or that has its name, else what diffusers takes it for.

    Raises BadModel for pickles, what is no model, and parts that are found nowhere, BackendUnavailable without gguf.
    """
    keys = _keys(file)
    found = source(base) if base is not None else _beside(file)
    try:
        found = found or fetch_diffusers_config(load_single_file_checkpoint(str(file)))["pretrained_model_name_or_path"]
        kind = getattr(diffusers, DiffusionPipeline.load_config(found)["_class_name"])
    except Exception as error:
        asked = "its directory" if found is None else repr(found)
        raise BadModel(
            f"{str(file)!r} needs the configuration of {asked}, which is not to be had ({first_line(error)}); name a "
            "model of the same kind as base (--base DIRECTORY)"
        ) from error
    try:
        if keys is not None and any(key.startswith(_WHOLE) for key in keys):
            return _complete(_whole(kind, file, found, dtype), file)
        return _complete(_denoiser_only(kind, file, found, dtype), file)
    except BadModel:
        raise
    except Exception as error:  # diffusers, transformers and huggingface_hub each raise their own kinds
        cut = "lacks tensors of its model" if "meta tensor" in str(error) else first_line(error)
        raise BadModel(f"{str(file)!r} cannot be loaded as a {kind.__name__}: {cut}") from error


def _keys(file: Path) -> list[str] | None:
    """The names of a file's tensors; None of a GGUF file, which has a denoiser's only."""
    if file.suffix in PICKLES:
        raise BadModel(f"{str(file)!r} is a pickle, which can run code when read; convert it to safetensors")
    if file.suffix == ".gguf":
        if find_spec("gguf") is None:
            raise BackendUnavailable("GGUF files need gguf: pip install 'fastdiff[gguf]'")
        with file.open("rb") as opened:
            if opened.read(4) != b"GGUF":
                raise BadModel(f"{str(file)!r} is truncated or corrupt: it does not begin as a GGUF file does")
        return None
    if file.suffix != ".safetensors":
        raise BadModel(f"{str(file)!r} is a file, but neither .safetensors nor .gguf; give one, or a directory")
    check_weights(file)
    with safe_open(file, framework="pt") as tensors:
        keys = list(tensors.keys())
    if any("lora" in key for key in keys):
        raise BadModel(f"{str(file)!r} is a LoRA; give it with --lora, on top of a model")
    return keys


def _beside(file: Path) -> str | None:
    """The directory of the model that a file belongs to, as far as places tell."""
    near = (file.with_suffix(""), file.parent)
    return next((str(folder) for folder in near if (folder / "model_index.json").is_file()), None)


def _whole(kind: Any, file: Path, base: str, dtype: torch.dtype) -> Any:
    """Parts that the file lacks, as diffusers says one by one, are those of `base`."""
    if not hasattr(kind, "from_single_file"):
        raise BadModel(f"diffusers reads no {kind.__name__} from one file; give its directory")
    parts: dict[str, Any] = {}
    while True:
        try:
            return kind.from_single_file(str(file), config=base, **{DTYPE: dtype}, **parts)
        except Exception as error:
            missing = _MISSING.search(str(error))
            if missing is None or missing[1] in parts:
                raise
            parts[missing[1]] = _part(missing[1], missing[2], file, base, dtype)


def _part(name: str, class_name: str, file: Path, base: str, dtype: torch.dtype) -> Any:
    import transformers

    kind: Any = getattr(diffusers, class_name, None) or getattr(transformers, class_name)
    try:
        return kind.from_pretrained(base, subfolder=name, use_safetensors=True, **{DTYPE: dtype})
    except Exception as error:
        raise BadModel(
            f"{str(file)!r} has no {name}, and {base!r} has no weights of one; name a whole model as base (--base)"
        ) from error


def _denoiser_only(kind: Any, file: Path, base: str, dtype: torch.dtype) -> Any:
    index = DiffusionPipeline.load_config(base)
    name = next((name for name in MAIN if index.get(name, [None])[0] is not None), "transformer")
    class_name = index.get(name, [None, ""])[1]
    model: Any = getattr(diffusers, class_name, None)
    if not hasattr(model, "from_single_file"):
        raise BadModel(f"diffusers reads no {class_name or name} from one file; give its directory")
    options: dict[str, Any] = {DTYPE: dtype, "config": base, "subfolder": name}
    if file.suffix == ".gguf":
        options["quantization_config"] = diffusers.GGUFQuantizationConfig(compute_dtype=dtype)
    denoiser = model.from_single_file(str(file), **options)
    try:
        return kind.from_pretrained(base, use_safetensors=True, **{DTYPE: dtype}, **{name: denoiser})
    except Exception as error:
        raise BadModel(
            f"{str(file)!r} is a {name} alone, and the rest cannot be had from {base!r} ({first_line(error)}); name a "
            "whole model as base (--base)"
        ) from error


def _complete(pipe: Any, file: Path) -> Any:
    """diffusers leaves what a file lacks without values, and says so only when it runs."""
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module):
            lost = [key for key, tensor in part.state_dict().items() if tensor.device.type == "meta"]
            if lost:
                raise BadModel(f"{str(file)!r} lacks tensors of its model: {len(lost)} of the {name}, first {lost[0]}")
    return pipe
