"""Every cache method with every quantization scheme under torch.compile: how many graphs, breaks and recompilations.

One graph of a computed step, one of a cached step where anything of the denoiser runs in it, no break, and nothing new
from the third run on. The second may add what sizes that torch takes for variable cost, which no pair here does.
"""

from __future__ import annotations

import pytest
import torch._dynamo

import fastdiff
from tests import tiny
from tests.coverage.graphs import compiled
from tests.laws.rows import ROWS, SCHEMES, STEPS

# Model, scope, graphs. A method that decides inside the denoiser takes the scope of blocks: the first of pixart is
# given another memory layout than the rest, so that there are two whatever is cached.
TABLE = {
    "static": ("pixart", "denoiser", 1),
    "static spectrum": ("pixart", "denoiser", 1),
    "static damped": ("pixart", "denoiser", 1),
    "static verify": ("pixart", "denoiser", 1),
    "static inner": ("sd15", "denoiser", 2),
    "static stack": ("pixart", "denoiser", 2),
    "deepcache": ("sd15", "denoiser", 2),
    "ab_cache": ("pixart", "denoiser", 1),
    "ab_cache blocks": ("pixart", "denoiser", 2),
    "ab_cache stack": ("pixart", "denoiser", 2),
    "easycache": ("pixart", "denoiser", 1),
    "seacache": ("pixart", "denoiser", 1),
    "taylorseer": ("pixart", "denoiser", 2),
    "taylorseer lite": ("pixart", "denoiser", 1),
    "fora": ("pixart", "denoiser", 2),
    "pab": ("pixart", "denoiser", 2),
    "tgate": ("pixart", "denoiser", 2),
    "tgate keep": ("pixart", "denoiser", 2),
    "joint": ("pixart", "denoiser", 2),
    "joint conditional": ("pixart", "denoiser", 2),
    "faster_diffusion serial": ("pixart", "denoiser", 2),
    "a_sdm": ("pixart", "denoiser", 2),
    "a_sdm unit": ("pixart", "denoiser", 2),
    "dp pixart": ("pixart", "denoiser", 1),
    "cachequant pixart": ("pixart", "denoiser", 2),
    "magcache pixart": ("pixart", "denoiser", 2),
    "switch pixart": ("pixart", "denoiser", 1),
    "first_block": ("pixart", "blocks", 2),
    "dbcache": ("pixart", "blocks", 2),
    "dicache": ("pixart", "blocks", 2),
    "dicache slope": ("pixart", "blocks", 2),
    "static speca": ("pixart", "blocks", 2),
    "teacache": ("pixart", "blocks", 2),
    "faster_diffusion": ("pixart", "blocks", 3),  # one step, and the several that it decodes ahead
}
# With other graphs than these: blocks whose layers have other bits are of another kind, and where inputs are quantized,
# both kinds of layout are decoded ahead.
OTHERS = {
    **{(row, "mixed"): 4 for row in ("first_block", "dbcache", "dicache", "dicache slope", "static speca", "teacache")},
    ("faster_diffusion", "mixed"): 6,
    **{("faster_diffusion", scheme): 4 for scheme in ("w8a8", "w8a8 static", "w4a8")},
}  # fmt: skip
# Written as text for a language model, which no scheme here is for; the same method on another family.
NOT_HERE = {"tgate flux"} | {row for row in ROWS if row.split()[0] in ("dp", "cachequant", "magcache", "switch")} - {
    *TABLE
}
# Static ranges are looked up by a tensor of the bucket, dynamic ones found in the graph: both have to hold.
QUICK = {("static", "fp8"), ("first_block", "w8a8 static")}  # the last: blocks share a graph
CASES = [
    pytest.param(row, scheme, id=f"{row}-{scheme}", marks=() if (row, scheme) in QUICK else pytest.mark.slow)
    for row in TABLE
    for scheme in SCHEMES
]


def test_every_method_is_in_the_table():
    assert set(ROWS) == set(TABLE) | NOT_HERE


@pytest.mark.parametrize(("row", "scheme"), CASES)
def test_a_pair_has_a_graph_of_computed_and_one_of_cached_steps(row, scheme, graphs):
    name, scope, usual = TABLE[row]
    wanted = OTHERS.get((row, scheme), usual)
    pipe = tiny.make(name)
    quant = SCHEMES[scheme](name) | {"speed": "smallest"}
    handle = fastdiff.accelerate(pipe, cache=ROWS[row].aggressive, quant=quant, compile=compiled(scope))
    torch._dynamo.utils.counters.clear()
    tiny.run(pipe, name, steps=STEPS)
    report = handle.report
    assert report.cached or report.partly, "nothing was left out"
    tiny.run(pipe, name, steps=STEPS, seed=1)
    made = len(graphs.sizes)
    tiny.run(pipe, name, steps=STEPS, seed=2)
    assert not torch._dynamo.utils.counters["graph_break"]
    assert (made, len(graphs.sizes)) == (wanted, wanted)
