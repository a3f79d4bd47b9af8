"""Ranges by percentile, and DGQ's smoothing by percentile: exact where all is held, better where tails are heavy."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import fastdiff
from fastdiff.config import Config
from fastdiff.errors import BadConfig
from fastdiff.quant.activations import Present
from fastdiff.quant.build import Found, build, layers_of
from fastdiff.quant.histogram import Histogram
from fastdiff.quant.observe import Observer
from fastdiff.quant.recipe import Recipe
from fastdiff.quant.schemes.w8a8 import W8A8
from tests import tiny
from tests.quant.test_ranges import SMALL, calibrated


def counted(*parts: torch.Tensor) -> Histogram:
    found = Histogram()
    for part in parts:
        found.add(part)
    return found


@pytest.mark.parametrize("percentile", [90, 99, 99.9, 99.99, 100])
def test_edges_are_those_of_the_sorted_values_within_a_bin(percentile):
    values = torch.randn(20_000, generator=torch.Generator().manual_seed(0)) ** 3 + 0.1
    low, high = counted(values).edges(percentile)
    beyond = int(len(values) * (100 - percentile) / 200)
    ordered = values.sort().values
    for edge, exact in ((high, float(ordered[-1 - beyond])), (-low, -float(ordered[beyond]))):
        assert exact <= edge <= exact * (1 + 1 / 32)
    assert int((values > high).sum()) <= beyond and int((values < low).sum()) <= beyond


def test_counts_do_not_depend_on_the_order_in_which_values_come():
    values = torch.randn(999, generator=torch.Generator().manual_seed(1)).exp()
    mixed = values[torch.randperm(999)]
    assert torch.equal(counted(values).counts, counted(mixed[:100], mixed[100:101], mixed[101:]).counts)


TINY = 2**-20 * 33 / 32  # the outer edge of the smallest bin
EXTREMES = {
    "nothing": ([], (0, 0)),
    "one sign": ([3.0, 5.0], (0, 5.125)),
    "tiny": ([-1e-30, 0.0], (-TINY, TINY)),
    "huge": ([-1e30], (-math.inf, 0)),
}


@pytest.mark.parametrize(("values", "edges"), EXTREMES.values(), ids=EXTREMES)
def test_zero_is_held_and_extremes_are_in_the_last_bins(values, edges):
    assert counted(torch.tensor(values)).edges(100) == edges


def test_all_values_are_the_ranges_of_all_that_was_seen_bit_for_bit():
    pipe = tiny.make(SMALL)
    observer = Observer(list(layers_of(pipe.unet)), 1, count=True)
    observer.bucket = 0
    with observer.watching():
        tiny.run(pipe, SMALL, steps=2)
    plain = observer.ranges(W8A8(), {})
    for settings in ({"observer": "percentile"}, {"smooth": "percentile"}):
        found = observer.ranges(W8A8(percentile=100, **settings), {})
        assert found.keys() == plain.keys()
        for name, ranges in plain.items():
            assert all(torch.equal(found[name][kind], ranges[kind]) for kind in ("low", "high")), name
            assert (found[name].get("smooth", torch.ones(1)) == 1).all()
    tight = observer.ranges(W8A8(observer="percentile", percentile=99), {})
    for name, ranges in plain.items():
        assert (tight[name]["low"] >= ranges["low"]).all() and (tight[name]["high"] <= ranges["high"]).all(), name
    narrower = [bool((tight[name]["high"] < ranges["high"]).all()) for name, ranges in plain.items()]
    assert sum(narrower) > len(narrower) / 2, "some lose less than a bin is wide"


def test_a_calibration_counts_what_it_is_told_to():
    pipe = tiny.make(SMALL)
    loose = calibrated(pipe, smooth="percentile")
    tight = calibrated(pipe, observer="percentile", percentile=90)
    assert loose.origin.smooth == "percentile" and tight.origin.smooth is None
    wide = {name: float(ranges["high"].max() * ranges["smooth"].max()) for name, ranges in loose.of("unet").items()}
    assert all(float(ranges["high"].max()) <= wide[name] for name, ranges in tight.of("unet").items())


def off(x: torch.Tensor, layer: nn.Linear, heard: torch.Tensor, **settings) -> float:
    """Squared error of the layer's output on x, with ranges of what was heard."""
    method = W8A8(**settings)
    observer = Observer([Found("layer", layer, ())], 1, count=method.observer == "percentile")
    observer.bucket = 0
    with observer.watching(), torch.no_grad():
        for part in heard.chunk(4):
            layer(part)
    found = build(layer, Recipe("int8", "int8", kernel="reference"), Present(), **observer.ranges(method, {})["layer"])
    with torch.no_grad():
        return float((found(x) - layer(x)).square().mean())


def test_the_error_of_a_heavy_tailed_layer_falls():
    """Student's t of 3 degrees, 2 million values: the largest of them stretch the range beyond what they are worth."""
    normal = torch.randn(2, 4, 32_768, 64, generator=torch.Generator().manual_seed(2))
    heard, x = (part[0] / part[1:].square().mean(0).sqrt() for part in normal)
    torch.manual_seed(0)
    layer = nn.Linear(64, 16)
    errors = [off(x, layer, heard, **s) for s in ({}, {"observer": "percentile", "percentile": 99.998})]
    assert errors[1] < 0.8 * errors[0]


def test_channels_above_the_percentile_are_smoothed_down_to_it():
    """And the error falls: nothing is cut, as the weights take what the channels lose."""
    x = torch.randn(2048, 64, generator=torch.Generator().manual_seed(3))
    x[:, 5] *= 30
    torch.manual_seed(0)
    layer = nn.Linear(64, 16)
    observer = Observer([Found("layer", layer, ())], 1)
    with observer.watching(), torch.no_grad():
        layer(x)
    smooth = observer.ranges(W8A8(smooth="percentile", percentile=98), {})["layer"]["smooth"]
    peaks = x.abs().amax(0)
    level = peaks.sort().values[-2]
    assert smooth[5] == pytest.approx(float(peaks[5] / level)) and (smooth[torch.arange(64) != 5] == 1).all()
    errors = [off(x, layer, x, **s) for s in ({}, {"smooth": "percentile", "percentile": 98})]
    assert errors[1] < 0.5 * errors[0]


def test_what_is_refused_is_told():
    for settings, said in (
        ({"observer": "percentile", "smooth": 0.5}, "leave those out"),
        ({"observer": "percentile", "split": True}, "leave those out"),
        ({"percentile": 99}, "set one"),
        ({"percentile": 50}, "greater than 50"),
        ({"percentile": 101}, "less than or equal to 100"),
        ({"smooth": 2}, "less than or equal to 1"),
        ({"smooth": "all"}, "smooth"),
    ):
        with pytest.raises(BadConfig, match=said):
            fastdiff.Config(quant={"method": "w8a8", **settings})
    assert Config(quant={"method": "w8a8", "smooth": "0.5"}).quant.smooth == 0.5
