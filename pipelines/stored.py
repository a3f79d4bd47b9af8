"""Which tensors the files of a component hold, as their heads tell; nothing of them is read."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from torch import Tensor, nn

_WEIGHTS = ("diffusion_pytorch_model", "model")  # what diffusers and transformers call a component's file
_VARIANT = re.compile(r"^\w+?(?:\.(\w+))?(?:-\d{5}-of-\d{5})?\.safetensors$")


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its shape, and its type in the words of safetensors."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def variant(folder: Path) -> str | None:
    """`fp16` where some component of a directory has its weights as `*.fp16.safetensors` alone."""
    for part in sorted(folder.glob("*/")):
        names = [_VARIANT.search(file.name) for file in part.glob("*.safetensors")]
        if names and all(name is not None and name[1] for name in names):
            return str(next(name for name in names if name)[1])
    return None


def stored(folder: Path, kind: str | None) -> dict[str, Stored]:
    """The tensors that diffusers reads of a component, by name, from the heads of its files; {} where it has none."""
    found: dict[str, Stored] = {}
    for file in _files(folder, kind):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  it is no dict
                there = opened.get_slice(name)
                found[name] = Stored(file, tuple(there.get_shape()), there.get_dtype())
    return found


def _files(folder: Path, kind: str | None) -> list[Path]:
    """In the order in which diffusers looks for them: of the variant first, and in shards first."""
    for own in (kind, None):
        for stem in _WEIGHTS:
            dotted = "" if own is None else f".{own}"
            index, single = f"{stem}.safetensors.index{dotted}.json", folder / f"{stem}{dotted}.safetensors"
            if (folder / index).is_file():
                named = json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"]
                return [folder / name for name in sorted({*named.values()})]
            if single.is_file():
                return [single]
    return []


def tensors_of(folder: Path, begin: str, done: set[str]) -> dict[str, Tensor]:
    """Those whose names begin so, and are not `done`. A view would keep the whole file mapped."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            names = [name for name in opened.keys() if name.startswith(begin) and name not in done]  # noqa: SIM118
            found |= {name: opened.get_tensor(name).clone() for name in names}
    done.update(found)
    return found


def places(module: nn.Module) -> dict[str, Tensor]:
    """What a file may hold; the state would make the integers of packed layers."""
    return dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
