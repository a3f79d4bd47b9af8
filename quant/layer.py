"""A quantized layer: a module with plain buffers, in the place of a float one that it looks like.

It holds no float weight: `weight` makes one when somebody asks. Buffers, by name: `q`, `scale` and others of the
format; `bias`; `smooth` [input channels] divides the input; `down`, `up` are a low-rank residual; `low`, `high`
[buckets + 1] are static ranges of the input (after `smooth`), the last of them that of all timesteps.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from .activations import Levels, Present, Quantize, between, channels_of, quantized, range_of, rows_of, scale_and_zero
from .lazy import LazyWeight
from .packing import FORMATS, Format, Tensors
from .recipe import Recipe
from .timed import FLOAT, fastest, machine, timed


class Kernel(ABC):
    """Code that computes a layer. `refuses` says why it cannot, `pack` makes what it is then called with.

    `replaces_q`: whether `unpack` gives the layer's `q` back, so that only the packed form is kept. `expected` is what
    its result must be near to.
    """

    name: str
    replaces_q: bool = False

    def refuses(self, layer: QLayer) -> str | None:
        return None

    def pack(self, layer: QLayer) -> Any:
        return None

    def unpack(self, layer: QLayer, packed: Any, tensors: Tensors) -> Tensor:
        raise NotImplementedError

    @abstractmethod
    def __call__(self, layer: QLayer, packed: Any, x: Tensor) -> Tensor: ...

    @abstractmethod
    def expected(self, layer: QLayer, x: Tensor) -> Tensor: ...


# gives the kernels for a layer, each with the packed weight, and what was passed over and why
Choose = Callable[["QLayer"], tuple[list[tuple[Kernel, Any]], str]]


class QLayer(nn.Module):
    """What both kinds of quantized layer share; `present`, which tells the timestep bucket, is the whole denoiser's."""

    bias: Tensor | None
    smooth: Tensor | None
    low: Tensor | None
    high: Tensor | None
    down: Tensor | None
    up: Tensor | None
    q: Tensor
    float_kind: ClassVar[type[nn.Module]]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Called with sizes, as by adapters that build a layer of the kind they find, it makes a float layer."""
        if kwargs or (args and isinstance(args[0], int)):
            return cls.float_kind(*args, **kwargs)
        return super().__new__(cls)

    def __init__(
        self, recipe: Recipe, tensors: Tensors, present: Present, choose: Choose, dtype: torch.dtype
    ) -> None:  # fmt: skip
        """tensors: the buffers by name; dtype: what `weight` has. Set the shape before the first call, which chooses a
        kernel."""
        nn.Module.__init__(self)  # not the float layer's, which would make a weight
        self.recipe, self.present, self.dtype = recipe, present, dtype
        for name in ("bias", "smooth", "low", "high", "down", "up"):
            self.register_buffer(name, tensors.get(name))
        self._stored = tuple(name for name in tensors if name not in self._buffers)
        for name in self._stored:
            self.register_buffer(name, tensors[name])
        self._choose = choose
        self._kernel: Kernel | None = None
        self._packed: Any = None
        self._home: torch.device | None = None  # where it was packed
        self._others: list[tuple[Kernel, Any]] = []  # that proved themselves too, for the clock to choose from
        self.proved: dict[torch.device, list[Kernel]] = {}
        self._runs: dict[Any, Callable[[Tensor], Tensor]] = {}  # what the clock chose, by shape and type
        self.floats: tuple[nn.Module, ...] = ()  # the float layer, where it is kept; no part of this module
        self._ranges: list[tuple[float, float]] = []
        self._at: Tensor | None = None  # which of them holds now, for graphs
        self._inverse: Tensor | None = None
        self._smooth_key: int | None = None

    @property
    def format(self) -> Format:
        return FORMATS[self.recipe.format]

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Outputs, and inputs of each."""
        raise NotImplementedError

    @property
    def by_picture(self) -> bool:
        """Whether a range is found for each picture: one for them all would make each depend on the others."""
        return False

    def apply_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The float layer with a weight [outputs, inputs]."""
        raise NotImplementedError

    def tensors(self) -> Tensors:
        """The stored weight, without bias and options, wherever the kernel keeps it."""
        found = {name: cast(Tensor, getattr(self, name)) for name in self._stored}
        if self._kernel is None or not self._kernel.replaces_q:
            return found
        home = {name: t.to(self._home) for name, t in found.items()}
        return {**found, "q": self._kernel.unpack(self, self._packed, home).to(self.q.device)}

    def matrix(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [outputs, inputs] that the integers stand for, for an input that was smoothed."""
        return self.format.unpack(self.tensors(), self.matrix_shape[1], dtype)

    @property
    def quantized_as(self) -> str:
        """What tells a plan made on these weights from one made on others."""
        eight = "" if self.recipe.activations == "none" else f" with {self.recipe.activations} activations"
        return self.recipe.format + eight

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, as they are stored."""
        extra = [b for name, b in self._buffers.items() if b is not None and name not in self._stored]
        return sum(t.nbytes for t in [*self.tensors().values(), *extra])

    def forward(self, input: Tensor) -> Tensor:  # by the name that the float layers have for it
        self.ready()
        assert self._kernel is not None
        if not self.present.by_clock or torch.compiler.is_compiling():  # inside a graph nothing is timed
            return self._quantized(self._kernel, self._packed, input)
        run = self._runs.get((input.shape, input.dtype))
        if run is None:
            run = self._runs[input.shape, input.dtype] = self._settled(input)
        return run(input)

    def ready(self) -> None:
        """Have a kernel for where the layer is: offloading moves buffers without a word."""
        if self._kernel is None or self._home != self.q.device:
            self.choose_kernel()

    def _quantized(self, kernel: Kernel, packed: Any, x: Tensor) -> Tensor:
        parts = x.split(1) if self.by_picture else (x,)
        y = torch.cat([kernel(self, packed, part) for part in parts]) if len(parts) > 1 else kernel(self, packed, x)
        return y if self.down is None else y + self._residual(x).to(y.dtype)

    @property
    def _timeable(self) -> bool:
        """Whether there is more than one way to compute the layer, and the clock may choose."""
        if self.recipe.speed == "smallest" or self.recipe.kernel != "auto":
            return False
        return bool(self._others or self.floats or self.recipe.speed == "fastest")

    def _settled(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """The fastest way to compute the layer on such an input; layers of one shape are timed once."""
        assert self._kernel is not None
        if not self._timeable or x.is_meta:  # whose tensors take no time at all
            return partial(self._quantized, self._kernel, self._packed)
        able = {kernel.name: (kernel, packed) for kernel, packed in [(self._kernel, self._packed), *self._others]}
        names = [*able, *([FLOAT] if self._has_float(x.dtype) else [])]

        def runs(name: str) -> Callable[[Tensor], Tensor]:
            return self._float(x.dtype) if name == FLOAT else partial(self._quantized, *able[name])

        key, known = self._key(x), self.present.times
        if known.get(key, {}).keys() != set(names):  # a table may be of a layer that had others
            with torch.no_grad():
                known[key] = timed({name: partial(self._alone, runs(name), x) for name in names}, x.device)
        self.present.used[key] = self.present.used.get(key, 0) + 1
        return runs(fastest(known[key]))

    def _alone(self, run: Callable[[Tensor], Tensor], x: Tensor) -> None:
        """Levels that another layer, or the last round, left behind would be for nothing."""
        self.present.forget()
        run(x)

    def _has_float(self, dtype: torch.dtype) -> bool:
        kept: Any = self.floats[0] if self.floats else None
        return self.recipe.speed == "fastest" if kept is None else kept.weight.dtype == dtype

    def _float(self, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        """The float layer: the one that is kept, or what the integers stand for, made once and held from then on."""
        if self.floats:
            kept: Any = self.floats[0]
            return lambda x: self.apply_weight(x, kept.weight, kept.bias)
        weight, bias = self.float_weight(dtype), None if self.bias is None else self.bias.to(dtype)
        return lambda x: self.apply_weight(x, weight, bias)

    def _key(self, x: Tensor) -> str:
        """What layers have in common that take the same time."""
        sizes = x.shape if isinstance(self, nn.Conv2d) else (x.numel() // x.shape[-1], x.shape[-1])
        rank = 0 if self.down is None else self.down.shape[0]
        given, own = "x".join(map(str, sizes)), "x".join(map(str, self.weight_shape))
        how = f"{self.quantized_as} {'static' if self._ranges else 'dynamic'} rank {rank}"
        where = machine(x.device, torch.get_num_threads())
        return f"{given} by {own}{self.geometry} {x.dtype} {how} on {where}"

    @property
    def geometry(self) -> str:
        """How a kernel goes over a picture."""
        return ""

    def levels(self, x: Tensor, top: int, how: Quantize = quantized) -> Levels:
        """The input as 8-bit levels 0 .. top. how: the code that finds them where values are at hand."""
        picture = isinstance(self, nn.Conv2d)
        if torch.compiler.is_compiling() and self.low is not None:  # the numbers would be a graph's for each layer
            assert self._at is not None and self.high is not None
            now = self._at % len(self.low)
            return quantized(rows_of(x, self), top, self._inverse, between(self.low[now][0], self.high[now][0], top))
        edges = self._ranges[-1 if self.present.bucket is None else self.present.bucket] if self._ranges else None

        def make() -> Levels:
            rows = rows_of(x, self)
            if edges is not None:
                return how(rows, top, self._inverse, scale_and_zero(*edges, top))
            return how(rows, top, self._inverse, range_of(rows, top, self._inverse) if picture else None)

        return self.present.shared(x, (picture, edges, top, self._smooth_key), make)

    @property
    def highest(self) -> float:
        """A value of the smoothed input that is the highest level."""
        return self._ranges[-1][1] if self._ranges else 3.0

    def finite(self, x: Tensor) -> bool:
        """Whether static ranges may be used; they would hide NaN and infinity. Not asked where it would be a wait, nor
        in a graph, which cannot branch on it."""
        if torch.compiler.is_compiling() or not self._ranges or x.device.type != "cpu":
            return True
        return math.isfinite(float(x.sum()))

    def smoothed(self, x: Tensor) -> Tensor:
        if self.smooth is None:
            return x
        return x / self.smooth.to(x.dtype).view(-1, *[1] * (-channels_of(self) - 1))

    def choose_kernel(self) -> str:
        """Pack for the fastest kernel that works here; says what was passed over and why, or nothing."""
        self._plain()
        low, high = self.low, self.high
        self._ranges = [] if low is None or high is None else [*zip(low.tolist(), high.tolist(), strict=True)]
        self._at = self.present.at(self.q.device) if self._ranges else None
        self._inverse = None if self.smooth is None else 1 / self.smooth
        self._smooth_key = None if self.smooth is None else hash(tuple(self.smooth.tolist()))
        if (proved := self.proved.get(self.q.device)) is None:
            found, said = self._choose(self)
        else:
            found, said = [(kernel, kernel.pack(self)) for kernel in proved], ""
        (self._kernel, self._packed), *self._others = found
        self._home, self.proved[self.q.device] = self.q.device, [kernel for kernel, _ in found]
        if self._kernel.replaces_q:
            self.q = self.q[:0].clone()  # empty, but of its type, by which others tell quantized weights
        return said

    @property
    def kernel_name(self) -> str:
        return "not chosen yet" if self._kernel is None else self._kernel.name

    @property
    def weight(self) -> Tensor:
        """The float weight, of the type that the float layer's would have now. Its numbers are made when they are used,
        and cannot be changed."""
        if torch.compiler.is_compiling():  # a graph holds plain tensors
            return self.float_weight()
        return LazyWeight(self.float_weight, self.weight_shape, self.dtype, self.q.device)

    def float_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """What the stored tensors stand for, in the shape of the float layer's weight and, by default, its type."""
        matrix = self.matrix()
        if self.smooth is not None:
            matrix = matrix / self.smooth.repeat_interleave(matrix.shape[1] // len(self.smooth))
        if self.down is not None and self.up is not None:
            matrix = matrix + self.up.float().flatten(1) @ self.down.float().flatten(1)
        return matrix.view(self.weight_shape).to(dtype or self.dtype)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return self.matrix_shape

    def _residual(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _plain(self) -> None:
        """Back to plain buffers, without a kernel."""
        self.q = self.tensors()["q"]
        self._kernel = self._packed = None
        self._others, self._runs = [], {}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QLayer:
        """Moves to another device; never changes the type of a buffer, as `pipe.to(dtype)` would: that is the type of
        the float weight."""
        asked = fn(torch.empty(0, dtype=self.dtype, device=self.q.device))
        self.dtype = asked.dtype
        if asked.device == self.q.device:
            return self
        self._plain()
        for name, buffer in self._buffers.items():
            if buffer is not None:
                moved = fn(buffer)
                self._buffers[name] = moved if moved.dtype == buffer.dtype else buffer.to(moved.device)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}q"] = self.tensors()["q"]

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if not any(key.startswith(prefix) for key in state_dict):
            return
        if f"{prefix}q" not in state_dict and f"{prefix}weight" in state_dict:
            args[-1].append(f"{prefix}weight is quantized here: load float weights first, and quantize them")
            return
        self._plain()
        self.proved.clear()
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: plain tensors, without what a kernel packed."""
        buffers = {**self._buffers, "q": self.tensors()["q"]}
        emptied: Any = {"_kernel": None, "_packed": None, "_others": [], "proved": {}, "_runs": {}, "floats": ()}
        return {**self.__dict__, "_buffers": buffers, **emptied}

    def extra_repr(self) -> str:
        outputs, inputs = self.matrix_shape
        return f"{inputs} -> {outputs}, {self.recipe.format}, activations {self.recipe.activations}, {self.kernel_name}"
