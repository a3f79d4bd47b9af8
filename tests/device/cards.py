"""A GPU for each thread, without one: tensors that say they are elsewhere, and whose work goes on in the order given.

Values are computed on the CPU. Tensors of two devices, or of two GPUs, do not meet; and whoever reads a value while the
work stands waits for it, forever where it never goes on: that is told instead. Torch's name for a device without memory
(`meta`) stands for the GPU, since a build without CUDA makes tensors of no other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from .replay import MOVES, READS

DEVICE = torch.device("meta")


class WrongDevice(AssertionError):
    """What CUDA would refuse."""


class Stuck(AssertionError):
    """The host waits for a value that the device never computes."""


class TooEarly(AssertionError):
    """A value is used before it is there."""


class OnCard(Tensor):
    """A tensor in the memory of one GPU."""

    inner: Tensor
    card: Card

    @staticmethod
    def __new__(cls, inner: Tensor, card: Card) -> OnCard:
        made = Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=DEVICE,
        )  # fmt: skip
        made.inner, made.card = inner, card
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @property
    def data(self) -> OnCard:
        return OnCard(self.inner, self.card)

    @data.setter
    def data(self, other: OnCard) -> None:
        """As of other tensors: the same object looks at other numbers from now on."""
        if other.card is not self.card or other.shape != self.shape:
            raise WrongDevice("a tensor was given the numbers of another GPU, or of another shape")
        self.inner = other.inner

    def __repr__(self, **_: Any) -> str:
        return f"OnCard({self.card.rank}, {self.inner!r})"

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.inner.untyped_storage()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        some = next(leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, OnCard))
        return some.card.run(func, args, kwargs or {})


class Card(TorchDispatchMode):
    """One GPU, for the thread that enters it. `stands` says why its work does not go on, if it does not."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.stands: Callable[[], str | None] = lambda: None
        self.generator = torch.Generator().manual_seed(1000 + rank)
        self.arriving: dict[int, str] = {}  # memory that is being received into, and from whom
        self.reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        leaves = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        mine = [leaf for leaf in leaves if isinstance(leaf, OnCard)]
        name = func._schema.name.split("::")[1]
        there = kwargs.get("device")
        self._check(name, leaves, mine)
        if mine and (name in READS or (there is not None and torch.device(there).type == "cpu")):
            self.read()
        wraps = (bool(mine) and (there is None or torch.device(there) == DEVICE)) or there == DEVICE
        if mine and name == "copy_" and not isinstance(args[0], OnCard):
            self.read()
            wraps = False
        outer = {id(leaf.inner): leaf for leaf in mine}
        plain = pytree.tree_map_only(OnCard, lambda leaf: leaf.inner, (args, kwargs))
        if there == DEVICE:
            plain[1]["device"] = torch.device("cpu")
        found = func(*plain[0], **plain[1])
        if not wraps:
            return found
        return pytree.tree_map_only(Tensor, lambda x: outer[id(x)] if id(x) in outer else OnCard(x, self), found)

    def _check(self, name: str, leaves: list[Tensor], mine: list[OnCard]) -> None:
        if any(leaf.card is not self for leaf in mine):
            raise WrongDevice(f"{name} of a tensor of another rank's GPU, on that of rank {self.rank}")
        for leaf in mine if self.arriving else ():
            sender = self.arriving.get(leaf.inner.untyped_storage()._cdata)
            if sender is not None:
                raise TooEarly(
                    f"{name} on rank {self.rank} uses what {sender} sends: nothing told the GPU to wait for it"
                )
        if any(leaf.is_meta and not isinstance(leaf, OnCard) for leaf in leaves):
            raise WrongDevice(f"{name} of a tensor without values")
        if mine and name not in MOVES and any(leaf.ndim for leaf in leaves if not isinstance(leaf, OnCard)):
            raise WrongDevice(f"{name} of tensors on the CPU and on a GPU")

    def read(self) -> None:
        """The host waits until all that the GPU was given is done."""
        self.reads += 1
        why = self.stands()
        if why is not None:
            raise Stuck(f"the host of rank {self.rank} waits for its GPU, which {why}")

    def __enter__(self) -> Card:
        self._lists = FromLists()
        self._lists.__enter__()
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self._lists.__exit__(*raised)

    def put(self, module: nn.Module) -> None:
        """Move a module here."""
        for part in module.modules():
            for name, weight in part._parameters.items():
                if weight is not None:
                    part._parameters[name] = nn.Parameter(OnCard(weight.data, self), requires_grad=False)
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    part._buffers[name] = OnCard(buffer, self)


class FromLists(TorchFunctionMode):
    """Tensors made of numbers: torch leaves the numbers out where they go to its device without memory."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu") == DEVICE:
            del kwargs["device"]
            return func(*args, **kwargs).to(DEVICE)
        return func(*args, **kwargs)
