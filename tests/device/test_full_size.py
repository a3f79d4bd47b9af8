"""SDXL, FLUX and Wan at their full size, on the meta device: what caches hold, what ranks of a patch split send."""

from __future__ import annotations

from typing import Any

import pytest

from fastdiff.parallel.mesh import Topology
from fastdiff.parallel.rehearsal import rehearse
from fastdiff.quant.build import layers_of
from fastdiff.quant.packing import FORMATS
from fastdiff.quant.schemes.w4a16 import W4A16
from fastdiff.registry import registry
from fastdiff.studio.holding import first_step
from fastdiff.weights import nbytes
from tests.some import some

from .full_size import model

STEPS = 6
HELD: dict[tuple[str, str], tuple[dict[str, Any], float]] = {
    # [2, 4, 128, 128] in bf16, once
    ("sdxl", "ab_cache"): ({"site": "output", "predictor": "reuse"}, 2 * 4 * 128 * 128 * 2),
    ("flux", "ab_cache"): ({"site": "output", "predictor": "reuse"}, 4096 * 64 * 2),
    # residuals of 4096 + 512 tokens of 3072 channels
    ("flux", "first_block"): ({}, (4096 + 512) * 3072 * 2),
    # 19 double blocks with attention and feed-forward of both streams, 38 single ones with one sum of both
    ("flux", "fora"): ({"interval": 2}, (19 * 2 + 38) * (4096 + 512) * 3072 * 2),
    # self-attention, cross-attention and feed-forward of 40 blocks, 32,760 tokens of 5120 channels, in two calls
    ("wan", "fora"): ({"interval": 2}, 3 * 40 * 32760 * 5120 * 2 * 2),
    ("wan", "ab_cache"): ({"site": "output", "predictor": "reuse"}, 2 * 16 * 21 * 60 * 104 * 2),
}


@pytest.mark.parametrize(("name", "method"), some(HELD, 2), ids=[" ".join(key) for key in HELD])
def test_a_cache_holds_what_its_regions_give(name, method):
    told, wanted = HELD[name, method]
    settings = registry("cache")[method].model_validate({"method": method, **told})
    anatomy, calls = model(name)
    held, foreseen = first_step(settings, anatomy, calls, STEPS)
    assert held == wanted
    assert foreseen == held * settings.history


_KEYS = 2 * 32760 // 2 * 5120 * 2  # keys and values of a half of Wan's tokens, in bf16
SENT: dict[str, tuple[dict[str, int], dict[str, int]]] = {
    # 70 self-attentions: 10 of 4096 tokens of 640 channels, 60 of 1024 of 1280; both halves of guidance, half the rows
    "sdxl": ({"kv": 70, "norm": 6, "halo": 5, "output": 1}, {"kv": 2 * (10 * 4096 * 640 + 60 * 1024 * 1280) * 2}),
    # 40 self-attentions of two calls; what leaves the last block is put together, before it is made pixels
    "wan": ({"kv": 80, "output": 2}, {"kv": 80 * _KEYS, "output": 2 * _KEYS // 2}),
}


@pytest.mark.parametrize("name", some(SENT, 2))
def test_what_a_rank_of_two_sends_in_a_step(name):
    """FLUX is not here: its width is read from its list of places, of which meta has no values."""
    exchanges, sent = SENT[name]
    anatomy, calls = model(name)
    settings = registry("parallel")["distrifusion"].model_validate({"method": "distrifusion", "devices": 2})
    found = rehearse(anatomy, calls, settings, Topology(1, 1, 2, rank=0)).stale
    assert dict(found.exchanges) == exchanges
    assert {kind: found.sent[kind] for kind in sent} == sent


# GB of bf16 and of 4 bits in groups of 64, of the whole denoiser: without modulations and embedders, and with them
WEIGHTS = {"flux": (23.80, 11.16, 6.35), "wan": (28.58, 7.64, 7.60), "sdxl": (5.13, 1.40, 1.37)}


@pytest.mark.parametrize("name", ["flux", *(pytest.param(name, marks=pytest.mark.slow) for name in ("wan", "sdxl"))])
def test_what_w4a16_leaves_of_a_model(name):
    """Modulations are a quarter of FLUX. Run with -s, it prints the table of docs/gpu.md."""
    denoiser, found = model(name)[0].denoiser, [nbytes(model(name)[0].denoiser)]
    for vectors in ("float", "int4"):
        method = W4A16(vectors=vectors)
        taken = [layer.layer.weight for layer in layers_of(denoiser) if method.takes(layer.name)]
        packed = sum(FORMATS["int4"].bytes(*weight.flatten(1).shape, method.group_size) for weight in taken)
        found.append(found[0] - sum(weight.nbytes for weight in taken) + packed)
    print(name, *(f"{size / 1e9:.2f} GB" for size in found))
    assert [round(size / 1e9, 2) for size in found] == list(WEIGHTS[name])
