"""torch.compile with a cache: one graph of a computed step, one of a cached step, the decision outside of both."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch._dynamo.mutation_guard import install_generation_tagging_init

import fastdiff
from fastdiff.errors import BadConfig
from fastdiff.pipelines.compile import repeated
from fastdiff.pipelines.families import anatomies
from tests.coverage.graphs import compiled
from tests.coverage.short import SHORT
from tests.state import differences, snapshot
from tests.zoo import ZOO

pytestmark = pytest.mark.usefixtures("graphs")
STEPS = 6
SLOW = pytest.mark.slow
AB = {"method": "ab_cache", "interval": 2, "warmup_steps": 1}
STATIC = {
    "ab_cache output": AB,
    "ab_cache stack": {**AB, "site": "stack"},
    "ab_cache blocks": {**AB, "site": "blocks"},
    "deepcache": {"method": "deepcache", "interval": 2},
    "static inner": {"method": "static", "compute_steps": [0, 3], "site": "inner", "branch": 2},
    "fora": {"method": "fora", "interval": 2},
    "taylorseer": {"method": "taylorseer", "interval": 2, "warmup_steps": 1},
    "a_sdm": {"method": "a_sdm", "interval": 2},
    "faster_diffusion one by one": {"method": "faster_diffusion", "interval": 2, "max_parallel": 1},
}
ANYWHERE = ("ab_cache output", "ab_cache blocks", "fora", "taylorseer", "a_sdm", "faster_diffusion one by one")
OUTSIDE = {  # decided on what enters the denoiser
    "easycache": {"method": "easycache", "threshold": 1e9, "warmup_steps": 2},
    "seacache": {"method": "seacache", "threshold": 1e9, "site": "output"},
}
INSIDE = {
    "first_block": {"method": "first_block", "threshold": 1.0},
    "dbcache": {"method": "dbcache", "threshold": 1.0, "warmup_steps": 1},
    "dicache": {"method": "dicache", "threshold": 1e9, "warmup_steps": 2},
    "teacache": {"method": "teacache", "threshold": 1.0},
    "seacache stack": {"method": "seacache", "threshold": 1e9, "site": "stack"},
}
DENOISER_CASES = [
    *[(row, "sd2") for row in (*ANYWHERE, "static inner", "deepcache")],
    *[(row, name) for name in ("flux", "pixart") for row in (*ANYWHERE, "ab_cache stack")],
    *[(row, name) for name in ("sd3", "wan") for row in ("ab_cache stack", "ab_cache blocks", "fora", "a_sdm")],
]


def sorted_out(cases: list[tuple[str, str]], *quick: tuple[str, str]) -> list[Any]:
    """Cases for parametrize; but for some they are slow: tracing takes seconds each."""
    return [pytest.param(*case, id="-".join(case), marks=() if case in quick else SLOW) for case in cases]


def uncompiled(pipe: DiffusionPipeline, name: str, cache: dict | None) -> tuple[Tensor, int]:
    with fastdiff.accelerate(pipe, **({"cache": cache} if cache else {})) as handle:
        return SHORT[name].run(pipe, STEPS), handle.report.cached


def leaf(pipe: DiffusionPipeline, name: str) -> Tensor:
    """A weight that is used exactly where the denoiser is computed in full."""
    return SHORT[name].deepest_leaf(pipe).weight


@pytest.mark.parametrize(
    ("row", "name"),
    sorted_out(
        DENOISER_CASES,
        ("ab_cache stack", "pixart"),
        ("deepcache", "sd2"),
    ),
)
def test_a_computed_and_a_cached_step_are_one_full_graph_each_whatever_the_step(row, name, graphs):
    entry = SHORT[name]
    pipe = entry.make()
    expected, cached = uncompiled(pipe, name, STATIC[row])
    handle = fastdiff.accelerate(pipe, cache=STATIC[row], compile=compiled("denoiser"))
    assert torch.equal(entry.run(pipe, STEPS), expected)
    assert handle.report.cached == cached > 0
    whole = row == "ab_cache output"  # a cached step enters no graph at all
    assert len(graphs.sizes) == 1 if whole else len(graphs.sizes) == 2 and graphs.sizes[1] < graphs.sizes[0]
    executions = STEPS - cached if whole else STEPS
    assert len(graphs.executed) == executions * entry.calls
    entry.run(pipe, STEPS, generator=torch.Generator().manual_seed(7))
    entry.run(pipe, STEPS + 3)
    assert len(graphs.sizes) == (1 if whole else 2), "no step, weight or noise level is part of a graph"


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ("ab_cache stack", "pixart"),
        *(
            pytest.param(*pair, marks=SLOW)
            for pair in (("deepcache", "sd2"), ("ab_cache blocks", "flux"), ("a_sdm", "sd2"))
        ),
    ],
)
def test_the_graph_of_a_cached_step_does_not_read_the_weights_of_what_it_leaves_out(row, name, graphs):
    entry = SHORT[name]
    pipe = entry.make()
    fastdiff.accelerate(pipe, cache=STATIC[row], compile=compiled("denoiser"))
    inner = leaf(pipe, name) if row != "a_sdm" else pipe.unet.mid_block.resnets[0].conv1.weight
    outer = next(entry.denoiser(pipe).parameters())
    entry.run(pipe, STEPS)
    assert graphs.reads(inner) == STEPS // 2 * entry.calls
    assert graphs.reads(outer) == STEPS * entry.calls


def test_another_size_adds_graphs_and_coming_back_adds_none(graphs):
    pipe = SHORT["pixart"].make()
    fastdiff.accelerate(pipe, cache=STATIC["ab_cache stack"], compile=compiled("denoiser", dynamic=False))
    expected = SHORT["pixart"].run(pipe, STEPS)
    SHORT["pixart"].run(pipe, STEPS, height=32, width=64)
    assert len(graphs.sizes) == 4
    assert torch.equal(SHORT["pixart"].run(pipe, STEPS), expected)
    assert len(graphs.sizes) == 4


def test_settings_that_skip_nothing_are_one_graph(graphs):
    pipe = SHORT["pixart"].make()
    plain = SHORT["pixart"].run(pipe, STEPS)
    fastdiff.accelerate(pipe, cache={**STATIC["fora"], "interval": 1}, compile=compiled("denoiser"))
    assert torch.equal(SHORT["pixart"].run(pipe, STEPS), plain)
    assert len(graphs.sizes) == 1


def test_sites_with_their_own_intervals_have_a_graph_for_each_combination(graphs):
    """PAB: self-attention every 2 steps, cross-attention every 6: both, self only, none."""
    pipe = SHORT["pixart"].make()
    pab = {"method": "pab", "between": [0, 1], "self_interval": 2, "cross_interval": 6}
    expected, _ = uncompiled(pipe, "pixart", pab)
    fastdiff.accelerate(pipe, cache=pab, compile=compiled("denoiser"))
    assert torch.equal(SHORT["pixart"].run(pipe, STEPS), expected)
    assert len(graphs.sizes) == 3
    SHORT["pixart"].run(pipe, STEPS + 3)
    assert len(graphs.sizes) == 3


@pytest.mark.parametrize("guidance", [pytest.param("drop", marks=SLOW), "delta", pytest.param("keep", marks=SLOW)])
def test_tgate_is_one_graph_of_both_halves_and_one_of_the_conditional_half(guidance, graphs):
    pipe = SHORT["pixart"].make()
    tgate = {"method": "tgate", "gate": 0.5, "guidance": guidance}
    expected, _ = uncompiled(pipe, "pixart", tgate)
    fastdiff.accelerate(pipe, cache=tgate, compile=compiled("denoiser"))
    assert torch.equal(SHORT["pixart"].run(pipe, STEPS), expected)
    SHORT["pixart"].run(pipe, STEPS + 3)
    assert len(graphs.sizes) == 2 and graphs.sizes[1] < graphs.sizes[0]


# what decides outside, and what decides inside


@pytest.mark.parametrize("name", ["pixart", pytest.param("flux", marks=SLOW)])
@pytest.mark.parametrize("row", OUTSIDE)
def test_a_dynamic_method_that_looks_at_the_denoiser_s_input_decides_outside_the_graph(row, name, graphs):
    pipe = SHORT[name].make()
    expected, cached = uncompiled(pipe, name, OUTSIDE[row])
    handle = fastdiff.accelerate(pipe, cache=OUTSIDE[row], compile=compiled("denoiser"))
    assert torch.equal(SHORT[name].run(pipe, STEPS), expected)
    assert handle.report.cached == cached > 0
    assert len(graphs.sizes) == 1 and len(graphs.executed) == (STEPS - cached) * SHORT[name].calls


def refused(name: str, cache: dict, scope: str) -> str:
    """What is said, in one sentence and before anything is changed."""
    pipe = SHORT[name].make()
    before = snapshot(pipe)
    with pytest.raises(BadConfig) as said:
        fastdiff.accelerate(pipe, cache=cache, compile=compiled(scope))
    assert differences(before, snapshot(pipe)) == []
    assert "\n" not in str(said.value) and f"compile.scope = {scope}" in str(said.value)
    return str(said.value)


@pytest.mark.parametrize("row", INSIDE)
def test_a_method_that_decides_inside_the_denoiser_is_refused(row):
    assert "decides inside the denoiser" in refused("pixart", INSIDE[row], "denoiser")


@pytest.mark.parametrize("name", ["sd2", "flux"])
def test_decoding_ahead_is_refused_inside_one_graph(name):
    cache = {"method": "faster_diffusion", "interval": 3}
    assert "makes predictions inside the denoiser" in refused(name, cache, "denoiser")


@pytest.mark.parametrize(
    ("name", "cache"),
    [
        ("pixart", STATIC["fora"]),
        ("sd2", STATIC["fora"]),
        ("flux", STATIC["taylorseer"]),
        ("pixart", {"method": "pab"}),
        ("sd2", {"method": "tgate"}),
        ("sd2", {"method": "a_sdm", "level": "unit"}),
    ],
)
def test_a_method_that_leaves_out_parts_of_compiled_blocks_is_refused(name, cache):
    assert "inside the blocks" in refused(name, cache, "blocks")


def test_a_refusal_keeps_what_was_accelerated_before():
    pipe = SHORT["pixart"].make()
    handle = fastdiff.accelerate(pipe, cache=AB)
    with pytest.raises(BadConfig):
        fastdiff.accelerate(pipe, cache="fora", compile=compiled("blocks"))
    SHORT["pixart"].run(pipe, STEPS)
    assert handle.active and handle.report.cached == STEPS // 2


# blocks

BLOCK_CASES = [
    *[(name, "pixart") for name in (*INSIDE, *OUTSIDE, "ab_cache output", "ab_cache stack", "ab_cache blocks")],
    *[(name, "flux") for name in (*INSIDE, "ab_cache stack")],
    *[(name, "sd2") for name in (*OUTSIDE, "deepcache", "static inner", "ab_cache blocks", "a_sdm")],
]


@pytest.mark.parametrize(("row", "name"), sorted_out(BLOCK_CASES, ("first_block", "flux"), ("deepcache", "sd2")))
def test_methods_around_compiled_blocks_give_the_same_and_add_no_graphs(row, name, graphs):
    entry, cache = SHORT[name], (STATIC | INSIDE | OUTSIDE)[row]
    pipe = entry.make()
    expected, cached = uncompiled(pipe, name, cache)
    with fastdiff.accelerate(pipe, compile=compiled("blocks")):
        entry.run(pipe, STEPS)
    alone = len(graphs.sizes)
    graphs.__init__()
    handle = fastdiff.accelerate(pipe, cache=cache, compile=compiled("blocks"))
    assert torch.equal(entry.run(pipe, STEPS), expected)
    assert handle.report.cached == cached
    entry.run(pipe, STEPS + 3)
    probed = row == "teacache" and name == "flux"  # the first block differs from the rest: it is looked into
    assert len(graphs.sizes) == alone + probed
    if cached and not row.startswith(("a_sdm", "first_block", "dbcache", "dicache", "teacache")):
        graphs.executed.clear()
        entry.run(pipe, STEPS)
        assert graphs.reads(leaf(pipe, name)) == (STEPS - cached) * entry.calls


@pytest.mark.parametrize("name", [pytest.param("sd2", marks=SLOW), "pixart", pytest.param("flux", marks=SLOW)])
def test_decoding_ahead_works_around_compiled_blocks(name, graphs):
    """Batches of several sizes: torch makes one more graph of a kind, for any size."""
    pipe = SHORT[name].make()
    cache = {"method": "faster_diffusion", "interval": 3}
    expected, cached = uncompiled(pipe, name, cache)
    handle = fastdiff.accelerate(pipe, cache=cache, compile=compiled("blocks"))
    assert torch.equal(SHORT[name].run(pipe, STEPS), expected)
    assert handle.report.cached == cached > 0


def test_blocks_of_a_kind_share_their_graphs(graphs):
    pipe = ZOO["sd3"].make()
    fastdiff.accelerate(pipe, compile=compiled("blocks"))
    ZOO["sd3"].run(pipe, STEPS)
    blocks = pipe.transformer.transformer_blocks
    assert len(graphs.executed) == STEPS * len(blocks) and len(blocks) == 4
    assert len(graphs.sizes) <= 3  # the last block is of another kind; the first is given another memory layout


LISTS = {
    "flux2": ("transformer_blocks", "single_transformer_blocks"),
    "chroma": ("transformer_blocks", "single_transformer_blocks"),
    "auraflow": ("joint_transformer_blocks", "single_transformer_blocks"),
    "hidream": ("double_stream_blocks", "single_stream_blocks"),
    "lumina2": ("noise_refiner", "context_refiner", "layers"),
    "z image": ("noise_refiner", "context_refiner", "layers"),
    "latte": ("transformer_blocks", "temporal_transformer_blocks"),
}


@pytest.mark.parametrize("name", [name if name == "hidream" else pytest.param(name, marks=SLOW) for name in LISTS])
def test_every_list_of_blocks_is_compiled_described_or_not(name, graphs):
    entry = ZOO[name]
    pipe = entry.make()
    denoiser = entry.denoiser(pipe)
    blocks = [block for path in LISTS[name] for block in denoiser.get_submodule(path)]
    assert set(repeated(anatomies(pipe)[0])) == set(blocks)
    expected = entry.run(pipe, 2)
    breaks = name == "hidream"  # experts are chosen by what the tokens hold
    fastdiff.accelerate(pipe, compile=compiled("blocks", fullgraph=not breaks))
    assert torch.equal(entry.run(pipe, 2), expected)
    assert len(graphs.executed) >= 2 * len(blocks) * entry.calls


@pytest.mark.parametrize("name", [name for name, entry in ZOO.items() if entry.deep.startswith("transformer.")])
def test_what_diffusers_calls_repeated_blocks_is_among_what_is_compiled(name):
    denoiser = ZOO[name].denoiser(pipe := ZOO[name].make())
    known = [m for m in denoiser.modules() if type(m).__name__ in (getattr(denoiser, "_repeated_blocks", None) or ())]
    kinds = Counter(map(type, known))  # HunyuanVideo lists embedders too, of which there is one
    chosen = repeated(anatomies(pipe)[0])
    assert chosen and {m for m in known if kinds[type(m)] > 1} <= {m for block in chosen for m in block.modules()}


@SLOW
def test_a_unet_with_more_kinds_of_layers_than_torch_keeps_graphs_of_one_function_is_compiled_in_full(graphs):
    pipe = ZOO["sd15"].make()
    layers = repeated(anatomies(pipe)[0])
    fastdiff.accelerate(pipe, compile=compiled("blocks"))
    ZOO["sd15"].run(pipe, 2)
    assert len(graphs.executed) == 2 * len(layers) and len(graphs.sizes) > torch._dynamo.config.recompile_limit


# taken back, side by side


@pytest.mark.parametrize("scope", ["blocks", "denoiser"])
def test_restore_leaves_nothing_of_the_compiler_behind(scope):
    install_generation_tagging_init()  # the first compilation of a process changes nn.Module for good
    pipe = SHORT["pixart"].make()
    plain = SHORT["pixart"].run(pipe, STEPS)
    before = snapshot(pipe)
    handle = fastdiff.accelerate(pipe, cache=STATIC["ab_cache stack"], compile=compiled(scope))
    assert not torch.equal(SHORT["pixart"].run(pipe, STEPS), plain)
    handle.restore()
    assert torch.equal(SHORT["pixart"].run(pipe, STEPS), plain)
    assert differences(before, snapshot(pipe)) == []


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["blocks", "denoiser"])
def test_settings_tried_one_after_the_other_do_not_use_up_torch_s_graphs(scope, graphs):
    pipe = SHORT["pixart"].make()
    made = []
    with torch._dynamo.config.patch(recompile_limit=3):
        for _ in range(5):
            with fastdiff.accelerate(pipe, cache=STATIC["ab_cache stack"], compile=compiled(scope)):
                SHORT["pixart"].run(pipe, 2)
            made.append(len(graphs.sizes))
    assert len({after - before for before, after in pairwise(made)}) == 1


def test_a_compiled_denoiser_goes_on_when_a_lora_comes(graphs):
    pytest.importorskip("peft")
    from peft import LoraConfig

    pipe = SHORT["sd3"].make()
    handle = fastdiff.accelerate(pipe, cache=STATIC["ab_cache stack"], compile=compiled("denoiser"))
    bare = SHORT["sd3"].run(pipe, STEPS)
    with torch.random.fork_rng():
        torch.manual_seed(4)
        pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    tuned = SHORT["sd3"].run(pipe, STEPS)
    assert not torch.equal(tuned, bare) and len(graphs.sizes) == 4
    handle.restore()
    with fastdiff.accelerate(pipe, cache=STATIC["ab_cache stack"]):
        assert torch.equal(SHORT["sd3"].run(pipe, STEPS), tuned)


@pytest.mark.slow
@pytest.mark.parametrize(("row", "name"), [("deepcache", "sd15"), ("ab_cache stack", "flux")])
def test_inductor_gives_close_pictures(row, name):
    pipe = ZOO[name].make()
    expected, cached = uncompiled(pipe, name, STATIC[row])
    handle = fastdiff.accelerate(pipe, cache=STATIC[row], compile=compiled("denoiser", backend="inductor"))
    result = ZOO[name].run(pipe, STEPS)
    assert handle.report.cached == cached > 0
    assert (result - expected).abs().max() < 1e-4 * max(1.0, float(expected.abs().max()))


def test_no_module_is_compiled_twice():
    for name, entry in ZOO.items():
        chosen: list[nn.Module] = repeated(anatomies(entry.make())[0])
        inside = {id(m) for block in chosen for m in block.modules() if m is not block}
        assert chosen and not inside & {id(block) for block in chosen}, name
