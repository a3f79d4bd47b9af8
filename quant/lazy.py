"""The float weight of a quantized layer, for whoever looks at it: its type, device and shape cost nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

_detach = torch.ops.aten.detach.default


class LazyWeight(Tensor):
    """Numbers that `make` makes at each use of them; no memory is held. It cannot be written to: that would be lost."""

    _make: Callable[[], Tensor]

    @staticmethod
    def __new__(
        cls, make: Callable[[], Tensor], shape: Iterable[int], dtype: torch.dtype, device: torch.device
    ) -> LazyWeight:
        """make: gives the same tensor of this shape, type and device each time."""
        found: LazyWeight = torch.Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype, device=device)
        found._make = make
        return found

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func is _detach:
            given = args[0]
            return cls(given._make, given.shape, given.dtype, given.device)
        written = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        named = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | (kwargs or {})
        if any(isinstance(leaf, cls) for leaf in pytree.tree_leaves([named.get(name) for name in written])):
            raise RuntimeError(_READ_ONLY)
        return func(*pytree.tree_map_only(cls, _made, args), **pytree.tree_map_only(cls, _made, kwargs or {}))

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        raise RuntimeError(_READ_ONLY)

    def __setitem__(self, *_: Any) -> None:
        raise RuntimeError(_READ_ONLY)

    def numpy(self, *, force: bool = False) -> Any:
        return _made(self).numpy(force=force)

    def tolist(self) -> Any:
        return _made(self).tolist()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return _made(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _made(self).__reduce_ex__(protocol)


_READ_ONLY = (
    "the weight of a quantized layer cannot be changed: this is a float copy of it, and the change would be lost; "
    "change the float model, then quantize"
)


def _made(weight: LazyWeight) -> Tensor:
    with torch.no_grad():
        return weight._make()
