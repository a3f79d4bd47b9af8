"""Quantizes the layers of a model one after the other, and says what it did to each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from fastdiff.errors import UnsupportedModel
from fastdiff.weights import hooks, nbytes

from .activations import Present
from .base import QuantMethod
from .build import Found, build, chosen, patched
from .layer import QLayer
from .packing import Tensors
from .recipe import Recipe

Put = Callable[[nn.Module, str, nn.Module], None]  # parent, name of the child, what comes in its place
Weights = Callable[[Found], AbstractContextManager[Any]]
Learned = Callable[[Found, Recipe], "Callable[[torch.Tensor, Recipe], Tensors] | None"]


@dataclass(frozen=True)
class LayerReport:
    """One layer: bytes of weight and bias before and after, and how far the weight is off, relative (Frobenius)."""

    component: str
    name: str
    format: str
    activations: str
    kernel: str
    before: int
    after: int
    error: float
    said: str = ""


@dataclass
class QuantReport:
    """What quantizing did. `output_error` is |changed - float| / |float| of the denoiser's output, `float_ms`,
    `compiled_ms` (float under torch.compile) and `quantized_ms` a call of it, where they were measured; `timed`
    has milliseconds of a layer's candidates by its shape; `seconds` are those of quantizing for good with all that it
    calibrates and measures, `predict_seconds` those of the prediction."""

    method: str
    layers: list[LayerReport] = field(default_factory=list)
    kept: int = 0
    patched: int = 0
    static: int = 0
    output_error: float | None = None
    predicted_error: float | None = None
    predict_seconds: float | None = None
    seconds: float | None = None
    float_ms: float | None = None
    compiled_ms: float | None = None
    quantized_ms: float | None = None
    timed: dict[str, dict[str, float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def before(self) -> int:
        return sum(layer.before for layer in self.layers)

    @property
    def after(self) -> int:
        return sum(layer.after for layer in self.layers)

    @property
    def speed(self) -> str:
        """Times the faster of the float ones that were measured; "no" where it is slower."""
        if not self.float_ms or not self.quantized_ms:
            return "not measured"
        times = min(self.float_ms, self.compiled_ms or self.float_ms) / self.quantized_ms
        return f"{times:.2f}x" if times > 1 else f"no ({times:.2f}x)"

    def summary(self) -> str:
        """One line."""
        mean = sum(layer.error for layer in self.layers) / max(1, len(self.layers))
        kernels = Counter(layer.kernel for layer in self.layers)
        ran = ", ".join(f"{count} {name}" for name, count in kernels.most_common())
        said = (
            f"{self.method}: {len(self.layers)} layers ({ran}), {self.before / 1e6:.1f} MB as {self.after / 1e6:.1f} MB"
        )
        return f"{said}, weights off by {mean:.2%}"

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "bytes_before": self.before, "bytes_after": self.after, "speed": self.speed}


def quantize_model(
    root: nn.Module, component: str, method: QuantMethod, put: Put, present: Present, report: QuantReport, *,
    ranges: Mapping[str, Tensors] | None = None, learned: Learned | None = None,
    watch: Callable[[int, int], None] | None = None, weights: Weights = nullcontext,
) -> None:  # fmt: skip
    """Put a quantized layer in the place of each that the method takes, and add it to the report.

    ranges: static ranges by layer; layers without any find theirs at each call. learned: for a layer, what rounds its
    weight, or None. watch: told how many layers of how many are done. weights: entered while a layer's weight is read.

    Raises UnsupportedModel, with the layer's name, for what cannot be quantized.
    """
    wanted = chosen(method, root)
    if not wanted:
        raise UnsupportedModel(f"quant.skip and quant.keep leave nothing of {component} to quantize")
    _refuse_hooked(root, wanted, component)
    for number, (found, recipe) in enumerate(wanted, 1):
        known = dict((ranges or {}).get(found.name, {})) if recipe.activations == "int8" else {}
        rounds = learned(found, recipe) if learned else None
        with weights(found):
            try:
                layer = build(found.layer, recipe, present, learned=rounds, **known)
                said = layer.choose_kernel()
            except UnsupportedModel as error:
                raise UnsupportedModel(f"{component}.{found.name} cannot be quantized: {error}") from None
            report.layers.append(_report(component, found, layer, said))
        report.static += "low" in known
        for parent, name in found.places:
            put(parent, name, layer)
        if watch is not None:
            watch(number, len(wanted))
    floats = [module for module in root.modules() if type(module) in (nn.Linear, nn.Conv2d)]
    report.kept += len(floats)
    report.patched += sum(map(patched, floats))


def _report(component: str, found: Found, layer: QLayer, said: str) -> LayerReport:
    weight = found.layer.weight.detach()
    exact, before = weight.float(), nbytes(found.layer)
    error = float((layer.float_weight(torch.float32) - exact).norm() / exact.norm().clamp_min(1e-12))
    recipe = layer.recipe
    return LayerReport(
        component, found.name, recipe.format, recipe.activations, layer.kernel_name, before, layer.nbytes, error, said
    )


def _refuse_hooked(root: nn.Module, wanted: list[tuple[Found, Recipe]], component: str) -> None:
    """What brings a layer's weight to the device when it is called would be lost with the layer, or bring the old."""
    streams = any(getattr(getattr(h, "group", None), "stream", None) for part in root.modules() for h in hooks(part))
    if streams or any(any(hooks(found.layer)) for found, _ in wanted):
        how = "with a stream" if streams else "one by one"
        raise UnsupportedModel(f"layers of {component} are offloaded {how}; quantize first, then enable offloading")
