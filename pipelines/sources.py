"""Where a model is: embedded, a local directory, a hub id. Safetensors only, checked before anything is built."""

from __future__ import annotations

import json
import re
from pathlib import Path

import diffusers
from safetensors import SafetensorError, safe_open

from fastdiff.errors import BadModel, UnknownName

EMBEDDED = Path(__file__).parent / "shapes" / "models"
DTYPE = "torch_dtype" if diffusers.__version__.startswith("0.41.") else "dtype"  # what diffusers calls it
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def embedded() -> dict[str, Path]:
    """Directories of the models that come with fastdiff, by name."""
    return {path.parent.name: path.parent for path in sorted(EMBEDDED.glob("*/model_index.json"))}


def source(model: str) -> str:
    """What diffusers is to read: a directory that was checked, or a hub id."""
    known = embedded()
    if model in known:
        return str(known[model])
    path = Path(model).expanduser()
    if path.exists():
        check_directory(path)
        return str(path)
    if _HUB_ID.fullmatch(model) and model.count("/") == 1 and not model.endswith((".toml", ".json", ".safetensors")):
        return model
    if "/" in model or model.startswith((".", "~")):
        raise BadModel(f"model directory {model!r} does not exist")
    raise UnknownName("model", model, [*known, "<a directory>", "<a hub id like org/name>"])


def check_directory(path: Path) -> None:
    """Refuse a directory that is no pipeline, or whose weights are truncated, corrupt, or pickles."""
    if not path.is_dir():
        raise BadModel(f"{str(path)!r} is a file; give the pipeline's directory, the one that holds model_index.json")
    index = path / "model_index.json"
    if not index.is_file():
        raise BadModel(f"{str(path)!r} is no diffusers pipeline: it has no model_index.json")
    try:
        components = json.loads(index.read_text(encoding="utf-8"))
        if not isinstance(components, dict) or "_class_name" not in components:
            raise ValueError("it names no pipeline class")
    except (ValueError, UnicodeDecodeError) as error:
        raise BadModel(f"{str(index)!r} is not a pipeline index: {error}") from None
    named = [name for name, parts in components.items() if isinstance(parts, list) and parts and parts[0] is not None]
    missing = [name for name in named if not (path / name).is_dir()]
    if missing:
        raise BadModel(f"{str(path)!r} is incomplete: model_index.json names {', '.join(missing)}, which is not there")
    for folder in (path / name for name in components if (path / name).is_dir()):
        files = [f for f in sorted(folder.iterdir()) if f.is_file()]
        weights = [f for f in files if f.suffix == ".safetensors"]
        pickles = [f.name for f in files if f.suffix in PICKLES]
        if pickles and not weights:
            raise BadModel(
                f"{folder.name} in {str(path)!r} has its weights as pickles only ({', '.join(pickles)}), which can run "
                "code when read; convert them to safetensors"
            )
        for file in weights:
            check_weights(file)
        for listing in folder.glob("*.safetensors.index*.json"):
            shards = set(json.loads(listing.read_text(encoding="utf-8"))["weight_map"].values())
            if lost := sorted(shards - {f.name for f in files}):
                raise BadModel(f"{folder.name} in {str(path)!r} is incomplete: {', '.join(lost)} is not there")


def check_weights(file: Path) -> None:
    """Raises BadModel for a file that is no safetensors file, or only a part of one."""
    try:
        with safe_open(file, framework="pt") as opened:
            opened.keys()
    except (SafetensorError, OSError, ValueError) as error:
        raise BadModel(f"{str(file)!r} is truncated or corrupt: {error}; fetch it again") from None


def first_line(error: Exception) -> str:
    """What an error of others says, in a line."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
