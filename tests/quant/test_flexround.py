"""FlexRound: rounding that is learned lowers the output error, and costs nothing afterwards."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastdiff
from fastdiff.errors import BadConfig
from fastdiff.pipelines.families import anatomies
from fastdiff.pipelines.planning import learned_by
from fastdiff.pipelines.quantize import quantize
from fastdiff.quant.build import Found
from fastdiff.quant.flexround import FlexRound, _moments, learned
from fastdiff.quant.packing import FORMATS
from fastdiff.quant.recipe import Recipe
from fastdiff.quant.schemes.w4a16 import W4A16
from tests import tiny
from tests.quant.heard import hear
from tests.quant.test_prune import PROMPTS, arguments


def correlated(rows: int, width: int, seed: int) -> torch.Tensor:
    """Inputs that mostly vary in a few directions, as activations do."""
    mix = torch.randn(width, width, generator=torch.Generator().manual_seed(0)) / torch.arange(1, width + 1)
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) @ mix


@pytest.mark.parametrize(
    ("form", "group", "width", "share"),
    [("int4", 16, 32, 0.85), ("int4", 64, 27, 0.85), ("int8", 64, 32, 1.01), ("int8", 64, 64, 0.95)],
)
def test_what_is_learned_has_a_smaller_output_error(form, group, width, share):
    """Much smaller in 4 bits; 8 bits leave little to gain."""
    weight = torch.randn(24, width, generator=torch.Generator().manual_seed(1))
    weight[3] = 0
    recipe = Recipe(form, group=group)
    fitted, judged = (x.T @ x / len(x) for x in (correlated(512, width, 2), correlated(512, width, 3)))
    x = correlated(512, width, 4)
    plain = FORMATS[form].pack(weight, group, "mse")
    found = learned(weight, recipe, fitted, judged, 300, 3e-3).tensors()
    assert {k: (t.shape, t.dtype) for k, t in found.items()} == {k: (t.shape, t.dtype) for k, t in plain.items()}
    errors = [
        float((x @ (FORMATS[form].unpack(tensors, width) - weight).T).square().mean()) for tensors in (plain, found)
    ]
    assert errors[1] < share * errors[0]


def test_a_rounding_that_does_not_generalise_is_not_kept():
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
    one = torch.zeros(16, 16)
    one[0, 0] = 1.0  # only the first input was ever seen
    kept = learned(weight, Recipe("int4", group=16), one, torch.eye(16), 100, 3e-3).tensors()
    plain = FORMATS["int4"].pack(weight, 16, "mse")
    off = [float((FORMATS["int4"].unpack(t, 16) - weight).square().sum()) for t in (kept, plain)]
    assert off[0] <= off[1] * (1 + 1e-6)


@pytest.mark.parametrize("layer", [nn.Linear(6, 4), nn.Conv2d(3, 4, 3, stride=2, padding=1, dilation=1)])
def test_second_moments_are_those_of_the_rows_a_layer_multiplies(layer):
    """The layer's own output has the energy that they say."""
    pipe = tiny.make("sd3")
    calls = hear(pipe, PROMPTS, batch=2, moments=1, **arguments("sd3"))
    x = torch.randn(2, 5, 6) if isinstance(layer, nn.Linear) else torch.randn(2, 3, 8, 8)
    calls.outputs = lambda: iter([layer(x)])  # type: ignore[method-assign]
    moment = _moments(layer, calls)
    weight = layer.weight.detach().flatten(1)
    with torch.no_grad():
        bare = layer(x) - (layer.bias if isinstance(layer, nn.Linear) else layer.bias.view(-1, 1, 1))
    channel_last = bare if isinstance(layer, nn.Linear) else bare.movedim(1, -1)
    energy = channel_last.flatten(0, -2).square().mean(0).sum()
    assert float(((weight @ moment) * weight).sum()) == pytest.approx(float(energy), rel=1e-4)


@pytest.mark.slow
def test_a_pipeline_is_quantized_with_less_output_error():
    call = arguments("sd3")
    errors = {}
    for rounding in ("mse", "flexround"):
        pipe = tiny.make("sd3")
        method = {"method": "w4a16", "rounding": rounding, "group_size": 64}
        errors[rounding] = quantize(pipe, {"quant": method}, PROMPTS, batch=2, **call).output_error
    assert errors["flexround"] < errors["mse"]


def test_what_cannot_be_learned_is_said_or_passed_over():
    pipe = tiny.make("sd3")
    calls = hear(pipe, PROMPTS, batch=2, moments=2, **arguments("sd3"))
    learner = FlexRound(calls)
    unused = nn.Linear(4, 4)
    assert learner(Found("unused", unused, ()), Recipe("int4")) is None
    assert learner(Found("unused", unused, ()), Recipe("float8")) is None
    assert learned_by(W4A16(), None) is None
    for settings in ({}, {"smooth": 0.5}, {"components": ("denoiser", "vae")}):
        with pytest.raises(BadConfig, match="rounding = flexround learns"):
            learned_by(W4A16(rounding="flexround", **settings), {"transformer": calls} if settings else None)
    with pytest.raises(BadConfig, match="flexround"):
        fastdiff.accelerate(pipe, quant={"method": "w4a16", "rounding": "flexround"})
    assert anatomies(pipe)[0].denoiser is pipe.transformer
