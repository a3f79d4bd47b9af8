"""CUDA's device checks, replayed on the meta device: what would raise or wait on a GPU, on a machine without one.

An operator of torch's native functions that has a kernel for CUDA and no `device_check: NoCheck` wants all its tensors
on one device; so the check on `meta` is that of a GPU. Reads (`item`, `equal`, `nonzero`) make the host wait for the
device, copies from ordinary memory do, too. Each is kept with the place in our code that asked for it.
"""

from __future__ import annotations

import traceback
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torchgen
import yaml
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).parents[2]
READS = ("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select")
MOVES = ("copy_", "_to_copy", "index", "index_put_", "_index_put_impl_", "set_")  # that take tensors of two devices


@cache
def checked() -> frozenset[str]:
    """Operators, with their overloads, that want all tensors on one device."""
    file = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
    found = []
    for entry in yaml.safe_load(file.read_text()):
        kernels = str(entry.get("dispatch", "")) + str(entry.get("structured_delegate", "CUDA"))
        if entry.get("device_check") != "NoCheck" and ("CUDA" in kernels or "structured_delegate" in entry):
            found.append(entry["func"].split("(")[0])
    return frozenset(found)


def place() -> str:
    """The innermost line of this repository on the stack, the tests left out."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename).resolve()  # rooms are linked into the package
        if ROOT in path.parents and path.parts[len(ROOT.parts)] not in ("tests", ".venv"):
            return f"{path.relative_to(ROOT)}:{frame.name}"
    return ""


class FromLists(TorchFunctionMode):
    """Tensors made on the device of numbers of the host: copies of ordinary memory, of which meta shows nothing."""

    def __init__(self, copies: Counter[str]) -> None:
        super().__init__()
        self.copies = copies

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = func in (torch.tensor, torch.as_tensor) and not isinstance(args[0], Tensor)
        found = func(*args, **kwargs)
        if (made or func is Tensor.new_tensor) and found.is_meta:
            self.copies[place()] += 1
        return found


class Replay(TorchDispatchMode):
    """`wrong` counts what raises on a GPU, `reads` and `copies` what waits there, each by place ("" is not ours)."""

    def __init__(self) -> None:
        super().__init__()
        self.wrong: Counter[str] = Counter()
        self.reads: Counter[str] = Counter()
        self.copies: Counter[str] = Counter()
        self._lists = FromLists(self.copies)

    def __enter__(self) -> Replay:
        self._lists.__enter__()
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self._lists.__exit__(*raised)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        full = f"{name}.{func._overloadname}" if func._overloadname != "default" else name
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        devices = {tensor.device.type for tensor in tensors}
        if len(devices) > 1:
            outside = any(t.device.type == "cpu" and t.ndim for t in tensors)
            if full in checked() or (outside and name not in MOVES):
                self.wrong[f"{full} of {sorted(devices)} at {place()}"] += 1
                there = pytree.tree_map(lambda x: x.to("meta") if isinstance(x, Tensor) else x, (args, kwargs))
                return func(*there[0], **there[1])
            if name == "copy_":
                self.copies[place()] += 1
        if name == "_to_copy" and kwargs.get("device") is not None:
            there, here = torch.device(kwargs["device"]).type, args[0].device.type
            if there != here:
                (self.reads if there == "cpu" else self.copies)[place()] += 1
            if there == "cpu" and here == "meta":
                return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if name in READS and "meta" in devices:
            self.reads[place()] += 1
            if name == "_local_scalar_dense":
                return 0.01 if args[0].is_floating_point() else args[0].dtype != torch.bool or True
            return True
        return func(*args, **kwargs)
