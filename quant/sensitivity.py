"""How much each layer's quantization moves the denoiser's output, measured; HIGGS' linear model tested.

Of https://arxiv.org/abs/2411.17525 comes the model: errors of layers, and so of a choice of bits, sum up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from fastdiff.errors import BadModel
from fastdiff.weights import require

from .allocate import Choice
from .build import Found
from .calls import Calls
from .packing import format_named
from .rounding import Rounding

FORMAT: Mapping[Choice, str] = {
    4: "int4", 5: "int4", 8: "int8", 16: "half", "normal2": "normal2", "normal3": "normal3", "normal4": "normal4",
}  # fmt: skip
_FINE = 16  # weights that share a scale, in 5 bits a weight


def said(bits: Choice) -> str:
    """A number of bits has uniform levels, a name normal ones."""
    return bits if isinstance(bits, str) else f"{bits} bits"


def stored_as(bits: Choice, group: int) -> tuple[str, int]:
    """Format and group size of so many bits; 5 are 4 in groups of 16, whose scales take the fifth."""
    return FORMAT[bits], min(group, _FINE) if bits == 5 else group


def stored(layer: nn.Linear | nn.Conv2d, bits: Choice, group: int) -> int:
    """Bytes of the layer's weight in so many bits."""
    outputs, inputs = layer.weight.flatten(1).shape
    form, group = stored_as(bits, group)
    return format_named(form).bytes(outputs, inputs, group)


def rounded(layer: nn.Linear | nn.Conv2d, bits: Choice, group: int, rounding: Rounding) -> Tensor:
    """The float weight that is left of a layer's when it is stored in so many bits."""
    weight = layer.weight.detach().float().flatten(1)
    name, group = stored_as(bits, group)
    form = format_named(name)
    kept = form.unpack(form.pack(weight, group, rounding), weight.shape[1])
    return kept.view(layer.weight.shape).to(layer.weight.dtype)


def sensitivities(
    calls: Calls, layers: Mapping[str, Found], choices: tuple[Choice, ...], group: int, rounding: Rounding,
    watch: Callable[[int, int], None] | None = None,
) -> dict[str, dict[Choice, float]]:  # fmt: skip
    """Relative squared error of the denoiser's guided output with one layer quantized, by layer and bits.

    What both halves of guidance err by is mixed as they are, which may cancel or multiply it. Each error is a mean over
    the steps of `calls`, made again with that weight in the layer's place; only one rounded weight is held at a time.
    Raises BadModel, naming the layer, where an output is not finite.
    """
    require(calls.anatomy.denoiser, calls.anatomy.component)
    table: dict[str, dict[Choice, float]] = {}
    for number, (name, found) in enumerate(layers.items(), 1):
        table[name] = {}
        for bits in choices:
            with weights({found.layer: rounded(found.layer, bits, group, rounding)}):
                error = calls.error(guided=True)
            if not math.isfinite(error):
                raise BadModel(f"with {name} in {said(bits)} the denoiser's output is not finite; add it to quant.skip")
            table[name][bits] = error
        if watch is not None:
            watch(number, len(layers))
    return table


def together(
    calls: Calls, layers: Mapping[str, Found], bits: Mapping[str, Choice], group: int, rounding: Rounding
) -> float:  # fmt: skip
    """Relative squared error of the output with all layers quantized as told: what the linear model predicts."""
    with weights({found.layer: rounded(found.layer, bits[name], group, rounding) for name, found in layers.items()}):
        return calls.error(guided=True)


@contextmanager
def weights(instead: Mapping[nn.Module, Tensor]) -> Iterator[None]:
    """Other weights for a while; the very same parameters come back."""
    before = {layer: layer._parameters["weight"] for layer in instead}
    try:
        for layer, weight in instead.items():
            layer._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
        yield
    finally:
        for layer, own in before.items():
            layer._parameters["weight"] = own
