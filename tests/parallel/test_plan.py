"""The planner: bytes are those of a run, DistriFusion's published table is reproduced, bad plans are refused."""

from __future__ import annotations

import json
import math
from collections import Counter
from copy import deepcopy
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

import fastdiff
from fastdiff.errors import BadConfig, UnsupportedModel
from fastdiff.parallel import REGISTRY
from fastdiff.parallel.elapsed import elapsed
from fastdiff.parallel.planner import Site, alone, attempt, candidates, halves, plan, trials
from fastdiff.parallel.rehearsal import Part, Rehearsed, rehearse
from fastdiff.parallel.sharing import Blocks
from fastdiff.parallel.trying import by_turns
from fastdiff.pipelines.families import FAMILIES, recognise
from fastdiff.pipelines.plan import observe, plan_parallel
from fastdiff.weights import nbytes
from scripts.predict_parallel import PUBLISHED, flux, flux_calls, sdxl, sdxl_calls
from tests import tiny
from tests.state import differences, snapshot

from .published import A100
from .ranks import start

PREDICTED = Path(__file__).parents[2] / "benchmarks" / "parallel-predictions.json"
TABLE = json.loads(PUBLISHED.read_text())[0]
POINTS = [
    pytest.param(pixels, devices, marks=() if k == at else pytest.mark.slow)
    for k, pixels in enumerate(TABLE["seconds"])
    for at, devices in enumerate(("2", "4", "8"))
]


def method(name: str, **fields: Any) -> Any:
    return REGISTRY[name](method=name, **fields)


@cache
def big(build: Any) -> Any:
    with torch.device("meta"):
        return recognise(build().to(torch.bfloat16).eval(), "denoiser", FAMILIES)


def asked(arguments: Any, pixels: int) -> list[Any]:
    with torch.device("meta"):
        torch.set_default_dtype(torch.bfloat16)
        try:
            return arguments(pixels)
        finally:
            torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(("pixels", "devices"), POINTS)
def test_published_table_of_distrifusion(pixels: str, devices: str) -> None:
    """The planner's own path, from a model without weights to seconds; two devices are the halves of guidance."""
    published, anatomy, side, count = TABLE["seconds"][pixels], big(sdxl), int(pixels), int(devices)
    calls, one_step = asked(sdxl_calls, side), published["1"] / TABLE["steps"]
    asks = method("cfg") if count == 2 else method("distrifusion", cfg=2)
    one = alone(anatomy, calls)
    site = Site(count, 300e9, 1e-5, 50, 8 * (side // 8) ** 2, 0, one_step=one_step, overhead=A100.of(side**2))
    found = plan(one, [attempt(anatomy, calls, asks, count, one)], site).rows[0]
    assert found.predicted_seconds == pytest.approx(published[devices], rel=0.1)


def test_bytes_of_sdxl_are_the_formula() -> None:
    anatomy, height = big(sdxl), 128
    asks = method("distrifusion", cfg=2)
    found = rehearse(anatomy, asked(sdxl_calls, 8 * height), asks, asks.topology(8, 1)).stale
    kv = 2 * 2 * (640 * 10 * (height // 2) ** 2 + 1280 * 60 * (height // 4) ** 2)
    assert found.sent["kv"] == 3 * kv // 4
    assert found.sent["norm"] == 3 * 46 * 32 * 3 * 4, "mean, variance and count, in float32, to three ranks"
    assert found.sent["output"] == 2 * (3 * 4 * height // 4 * height + 4 * height * height), "patches, then halves"


def test_bytes_and_operations_of_flux_are_the_formula() -> None:
    anatomy, asks, tokens = big(flux), method("pcpp", portion=0.5), 4096
    calls = asked(flux_calls, 1024)
    part = rehearse(anatomy, calls, asks, asks.topology(4, 1))
    assert part.fresh.sent["kv"] == 3 * 57 * 2 * 2 * 3072 * tokens // 4
    assert part.stale.sent["kv"] == 2 * 57 * 2 * 2 * 3072 * tokens // 8, "half of its rows to each neighbour"
    seen = 4 * 57 * 3072 * (1024 + 512)
    assert part.fresh.flops - part.stale.flops == seen * (tokens // 4 * 3 - 2 * 512), "keys that it does not see"


def on_four(name: str, **fields: Any) -> Part:
    asks = method(name, **fields)
    return rehearse(big(flux), asked(flux_calls, 1024), asks, asks.topology(4, 1)).fresh


@pytest.mark.slow
def test_bytes_and_operations_of_rings_are_the_formula() -> None:
    """Flux at 1024 pixels on 4 ranks: keys and values once round; or queries, what they found and a float for each
    query and head, and what the text's found to all."""
    tokens, text, width, heads = 4096, 512, 3072, 24
    ring, token = (on_four(name) for name in ("ring", "token_ring"))
    per, words = 57 * 3, (2 * width + 4 * heads) * text
    assert ring.sent["kv"] == per * 2 * 2 * width * tokens // 4
    assert token.sent["kv"] == per * (2 * 2 * width * tokens // 4 + 4 * heads * tokens // 4 + words)
    under = [work for work, _, size in ring.events if size is None]
    assert 0 < sum(under) < ring.flops, "what is computed before a block is waited for"
    spared = 4 * 57 * width * text * (tokens - tokens // 4)
    assert ring.flops - token.flops == spared, "what the text sees of other ranks' keys, they have looked up"


def test_stages_send_a_twentieth_of_a_ring_and_hold_their_own_blocks() -> None:
    """Flux at 1024 pixels on 4 ranks: hidden states of picture and text once; the last one its output to three."""
    asks, anatomy = method("pipefusion"), big(flux)
    calls = asked(flux_calls, 1024)
    first, last = (rehearse(anatomy, calls, asks, asks.topology(4, rank)) for rank in (0, 3))
    ring = 57 * 3 * 2 * 2 * 3072 * 4096 // 4
    for part in (first.fresh, first.stale):
        assert +part.sent == {"stage": (4096 + 512) * 3072 * 2} and part.sent.total() * 20 < ring
    assert +last.stale.sent == {"output": 3 * 4096 * 64 * 2}
    blocks = sum(nbytes(block) for block in anatomy.blocks)
    largest = max(nbytes(block) for block in anatomy.blocks)
    for found in (first, last):
        assert abs(found.spared - blocks * 3 / 4) < largest, "a stage's weights, to one block"


@pytest.mark.slow
def test_bytes_and_operations_of_teams_are_the_formula() -> None:
    """Two teams of two: inside, three times the tokens of a rank in half of the heads, results back, the text's to the
    other; then half of the heads of two ranks' keys and values to the other team."""
    tokens, text, width = 4096, 512, 3072
    patch, ring, teams, ulysses = (
        on_four(name, **more) for name, more in (("patch", {}), ("ring", {}), ("ring", {"ulysses": 2}), ("ulysses", {}))
    )
    inside = 2 * (3 * width // 2 + width // 2) * tokens // 4 + 2 * width // 2 * text
    assert teams.sent["kv"] == 57 * (inside + 2 * 2 * width // 2 * tokens // 2)
    assert ring.flops == patch.flops and ring.sent["kv"] == patch.sent["kv"]
    assert not any(work for part in (patch, ulysses) for work, _, size in part.events if size is None)
    assert teams.flops < ring.flops, "of the text's queries, half of the heads"


@cache
def told() -> list[dict[str, Any]]:
    found = start("tests.parallel.planned", [(("sent",), 2), (("sent",), 3)])
    return [one for group in found for one in group["sent"]]


@pytest.mark.xdist_group("planned")
@pytest.mark.parametrize("index", range(5), ids=lambda k: f"2 ranks, {k}" if k < 2 else f"3 ranks, {k - 2}")
def test_rehearsed_bytes_are_those_of_a_run(index: int) -> None:
    found = deepcopy(told()[index])
    assert isinstance(found, dict), found
    assert len(found) == (3 if index < 2 else 6)
    for label, (real, expected) in found.items():
        del real["decision"]  # once a run: whether the ranks were given the same
        assert real == expected, label


def test_memory_and_bytes_are_the_same_without_weights() -> None:
    anatomy, calls, _ = observe(tiny.make("sd15"), 128)
    asks = method("distrifusion")
    live = rehearse(anatomy, calls, asks, asks.topology(2, 0), rounds=1)
    anatomy.denoiser.to("meta")
    bare = [
        (tuple(leaf.to("meta") for leaf in args), {k: v.to("meta") if hasattr(v, "to") else v for k, v in kw.items()})
        for args, kw in calls
    ]
    meta = rehearse(anatomy, bare, asks, asks.topology(2, 0))
    assert (live.stale.sent, live.stale.flops) == (meta.stale.sent, meta.stale.flops)
    assert live.held == pytest.approx(meta.held, rel=0.02)
    assert live.stale.seconds > 0


def test_a_plan_leaves_the_pipeline_as_it_was() -> None:
    pipe = tiny.make("flux")
    observe(pipe, 64)  # a pipeline remembers the arguments of its last call
    before = snapshot(pipe)
    found, exact = plan_parallel(pipe, 2, 1e9, size=64, steps=6), {"patch", "ulysses", "ring", "token_ring"}
    assert [text for text in differences(before, snapshot(pipe)) if "scheduler" not in text] == []
    assert "step" not in vars(pipe.scheduler)
    assert {row.method for row in found.rows} == {"distrifusion", "pcpp", "parastep", "pipefusion", *exact}
    assert {row.method for row in found.rows if row.exact} == exact


def test_halos_travel_with_statistics_where_every_step_waits() -> None:
    """Those of a residual block's two convolutions, and of the last; as many bytes in fewer messages."""
    anatomy, calls, _ = observe(tiny.make("sd15"), 128)
    plays = ((asks, asks.topology(2, 0)) for asks in (method("patch"), method("distrifusion")))
    waits, apart = (rehearse(anatomy, calls, *play, rounds=1).fresh for play in plays)
    assert waits.sent.total() == apart.sent.total() and waits.exchanges["norm"] == apart.exchanges["norm"]
    blocks = sum(hasattr(module, "conv_shortcut") for module in anatomy.denoiser.modules())
    assert apart.exchanges["halo"] - waits.exchanges["halo"] == 2 * blocks + 1


def test_a_border_that_is_not_read_is_refused() -> None:
    """A block of which the first convolution is left out: what travelled for it would stand in the picture."""
    anatomy, calls, _ = observe(tiny.make("sd15"), 128)
    block = anatomy.denoiser.mid_block.resnets[0]
    block.forward = lambda x, *_args: block.norm2(block.norm1(x))
    asks = method("patch")
    with pytest.raises(UnsupportedModel, match="a Conv2d does not read what the normalization before it gives"):
        rehearse(anatomy, calls, asks, asks.topology(2, 0))


def test_two_calls_are_two_halves() -> None:
    anatomy, calls, output = observe(tiny.make("flux"), 64)
    assert not halves(calls) and halves(calls * 2)
    asks = method("cfg")
    one, part = alone(anatomy, calls * 2), rehearse(anatomy, calls * 2, asks, asks.topology(2, 0), rounds=1)
    assert part.stale.flops * 2 == one.stale.flops
    assert part.stale.sent == {"output": output}


def test_shares_that_differ_are_played_by_the_longest_too() -> None:
    anatomy, calls, _ = observe(tiny.make("sd15_two_layers"), 256)
    one = Rehearsed(Part(), Part(), 0)
    even, odd = (attempt(anatomy, calls, method("patch"), devices, one) for devices in (4, 3))
    assert (len(even.played), len(odd.played)) == (1, 2)


def exchanged(before: int, under: int) -> tuple[tuple[int, int, int | None], ...]:
    """Four exchanges of 25 bytes and the output, and operations before and during each; the output is waited for."""
    pairs = (((before, k, 25), (under, k, None)) for k in range(4))
    return (*(event for pair in pairs for event in pair), (before + under, 4, 10), (0, 4, None))


# seconds and bytes that are easy to add up: compute 1 s, half of it on two ranks, 100 bytes hidden, 10 of output
ONE = Rehearsed(Part(seconds=1.0), Part(seconds=1.0), 1000)
PART = Part(Counter(kv=100, output=10), Counter(kv=4, output=1), 0.5, flops=10, events=exchanged(2, 0))


def costs(name: str, link: float, memory: float = math.inf, part: Part = PART, **fields: Any) -> list[Any]:
    from fastdiff.parallel.planner import Trial

    asks, blocks = method(name, **{k: v for k, v in fields.items() if k != "blocks"}), fields.get("blocks", Blocks())
    trial = Trial(asks, asks.topology(2, 0), [Rehearsed(part, part, 500)])
    return plan(ONE, [trial], Site(2, link, 0.01, 10, 20, 3000, memory, blocks=blocks)).rows


def cost(name: str, link: float, memory: float = math.inf, part: Part = PART, **fields: Any) -> Any:
    return costs(name, link, memory, part, **fields)[0]


def test_a_synchronous_step_adds_up_and_a_displaced_one_hides() -> None:
    assert cost("patch", 1000).predicted_step_seconds == pytest.approx(0.5 + 5 * 0.01 + 0.11)
    late = cost("distrifusion", 1000, warmup_steps=1)
    assert late.predicted_seconds == pytest.approx(2 * 0.66 + 8 * (0.5 + 0.01 + 0.01)), "hidden behind the computation"
    slow = cost("distrifusion", 100, warmup_steps=1)
    assert slow.predicted_seconds == pytest.approx(2 * 1.65 + 8 * (1.0 + 0.01 + 0.1)), "the link is the limit"
    assert late.predicted_speedup == pytest.approx(10 / late.predicted_seconds)


def test_what_travels_round_a_ring_hides_under_its_attention() -> None:
    part = replace(PART, events=exchanged(1, 1))
    fast, slow = cost("ring", 1e4, part=part), cost("ring", 100, part=part)
    assert fast.predicted_step_seconds == pytest.approx(0.5 + 0.01 + 10 / 1e4), "there before it is needed"
    assert slow.predicted_step_seconds == pytest.approx(0.5 + 5 * 0.01 + 1.1 - 4 * 0.05)


def test_of_halves_that_take_turns_one_sends_while_the_other_computes() -> None:
    fast, slow = (cost("patch", link, halves=True) for link in (500, 50))
    assert fast.predicted_step_seconds == pytest.approx(0.5 + 0.01 + 5 / 500), "but half of the output"
    assert slow.predicted_step_seconds == pytest.approx(0.05 + 110 / 50 + 0.01), "the link never rests"
    assert fast.settings["halves"] is True and "halves" not in cost("patch", 500).settings
    assert len(costs("patch", 4e3, 100, blocks=Blocks((640,) * 8), halves=True)) == 1, "no shares of the weights"


WAYS: dict[str, dict[str, Any]] = {"whole": {}, "groups": {"groups": 2}, "halves": {}, "both": {"groups": 2}}
MEASURED = json.loads(PREDICTED.with_name("parallel-turns.json").read_text())["rows"]


@pytest.mark.parametrize("row", MEASURED, ids=lambda row: f"{row['model']} {row['method']} {row['share']}")
def test_turns_are_predicted_in_the_order_in_which_they_were_measured(row: dict[str, Any]) -> None:
    anatomy, calls, _ = observe(fastdiff.load(row["model"]), 64)
    anatomy.denoiser.to("meta")
    told = row["ways"]

    def asked(leaf: torch.Tensor) -> torch.Tensor:
        sides = [side * row["size"] // 64 for side in leaf.shape[1:]] if leaf.ndim == 4 else leaf.shape[1:]
        return torch.empty((*(n * row["images"] for n in leaf.shape[:1]), *sides), dtype=leaf.dtype, device="meta")

    calls = pytree.tree_map_only(torch.Tensor, asked, calls)
    seconds: dict[str, float] = {}
    for way in told:
        asks = method("distrifusion") if way == "apart" else method(row["method"], **WAYS[way])
        part = rehearse(anatomy, calls, asks, asks.topology(2, 0)).fresh
        assert part.sent.total() == pytest.approx(told[way]["bytes"], rel=0.01)
        parts, computing = 1 + (way in ("halves", "both")), told["whole"]["computed_seconds"]
        seconds[way] = elapsed(part.events, part.flops, computing, row["bytes_per_second"], 1e-4, parts)
    found = [seconds[way] for way in sorted(told, key=lambda way: told[way]["waited_seconds"])]
    assert all(a < b * 1.001 for a, b in pairwise(found)) and found[0] < found[-1]


def test_turns_are_tried_where_a_method_has_them() -> None:
    for name, more in (("sd3", {"patch", "ring", "token_ring", "ulysses"}), ("flux", set[str]())):
        anatomy, calls, _ = observe(tiny.make(name), 64)
        one = alone(anatomy, calls)
        tried = [attempt(anatomy, calls, asks, 2, one) for asks in candidates(2, halves(calls))]
        found = [trial.method.model_dump() for trial in by_turns(anatomy, calls, 2, one, tried)]
        assert {one["method"] for one in found if one["halves"]} == more, "of a batch of one there are none"
        assert [one["method"] for one in found if one.get("groups", 1) > 1] == ["ulysses"] * (1 + bool(more))


def test_stages_fill_and_drain_in_each_step() -> None:
    found = cost("pipefusion", 1e12, part=Part(seconds=0.5), patches=4)
    assert found.predicted_seconds == pytest.approx(0.5 * 2 + 9 * 0.5 * 5 / 4), "one step of one patch, then of four"
    assert not found.exact


def test_parastep_takes_a_message_a_cycle() -> None:
    whole = Part(seconds=1.0)
    found = cost("parastep", 1000, part=whole, warmup_steps=3)
    assert found.predicted_seconds == pytest.approx(3 + 4 + 4 * (0.01 + 20 / 1000)), "7 steps in 4 cycles of 2"
    assert found.mesh == (1, 2, 1) and not found.exact


def test_what_is_slower_or_too_big_is_refused() -> None:
    assert "predicted slower than one device" in cost("patch", 10).refused
    assert "too big: predicted to need" in cost("patch", 1000, memory=3400).refused
    assert cost("patch", 1000, memory=3500).refused is None


def test_what_is_too_big_is_tried_with_shares_of_the_weights() -> None:
    """Four blocks of 640 bytes, of which a rank keeps 320 each, and has two: 2560 - 4 * 320 - 2 * 640 = 0 are spared;
    of eight, 1280."""
    few, many = Blocks((640,) * 4), Blocks((640,) * 8)
    whole, shared = sorted(costs("patch", 4e3, 3499, blocks=few), key=lambda row: len(row.settings))
    assert "too big" in whole.refused and "too big" in shared.refused
    found, plain = cost("patch", 4e3, 3499, blocks=many), cost("patch", 4e3)
    assert found.refused is None and found.settings["shard"] == "blocks"
    assert found.predicted_memory == plain.predicted_memory - 1280
    assert found.counted_kinds["weights"] == 8 * 320, "of a half, to one other rank"
    # 0.64 s of weights, under 0.5 s of computing; a displaced method's own bytes travel then, too
    assert found.predicted_step_seconds == pytest.approx(plain.predicted_step_seconds + 0.64 - 0.5)
    late, old = (cost("distrifusion", 4e3, m, warmup_steps=1, blocks=many) for m in (3499, math.inf))
    assert late.predicted_step_seconds == pytest.approx(old.predicted_step_seconds + 0.64 - (0.5 - 100 / 4e3))
    assert len(costs("parastep", 1e9, 100, blocks=many)) == len(costs("pipefusion", 1e9, 100, blocks=many)) == 1


def test_two_calls_fetch_all_blocks_twice_unless_each_rank_has_one() -> None:
    blocks = Blocks((640, 128), calls=2)
    assert blocks.sent(method("patch").topology(2, 0)) == 2 * (320 + 64)
    assert blocks.sent(method("cfg").topology(2, 0)) == 320 + 64
    assert blocks.sent(method("patch", cfg=2).topology(4, 0)) == 3 * (192 + 64), "in pieces of 64 bytes"


def test_what_cannot_be_split_is_refused_with_the_reason() -> None:
    anatomy, calls, _ = observe(tiny.make("sd15"), 64)
    one = alone(anatomy, calls)
    found = plan(one, trials(anatomy, calls, 16, one), Site(16, 1e9, 0, 10, 100, 0)).rows
    reasons = {row.method: row.refused for row in found}
    assert "too few for 8 patch ranks" in reasons["patch"]
    assert "by rows" in reasons["ulysses"]
    assert reasons["parastep"] is None
    assert all(row.refused is None for row in found[:1]) and math.isinf(found[-1].predicted_seconds)


def test_guidance_is_shared_out_first() -> None:
    meshes = {m.method: m.topology(4, 0) for m in candidates(4, guided=True)}
    assert {(t.cfg, t.patch) for n, t in meshes.items() if n != "parastep"} == {(2, 2)} and "cfg" not in meshes
    assert (meshes["parastep"].cfg, meshes["parastep"].step) == (2, 2)
    assert "cfg" in {m.method for m in candidates(2, guided=True)}
    assert all(m.cfg == 1 for m in candidates(4, guided=False))


@pytest.mark.parametrize(("devices", "link"), [(1, 1e9), (2, 0.0), (2, math.inf), (2, math.nan)])
def test_numbers_that_cannot_be(devices: int, link: float) -> None:
    with pytest.raises(BadConfig, match="a plan needs 2 devices or more"):
        plan_parallel(tiny.make("sd15"), devices, link)


def test_committed_predictions_are_next_to_the_papers() -> None:
    found = json.loads(PREDICTED.read_text())
    assert found["what"].startswith("PREDICTIONS")
    rows = found["rows"]
    assert {(r["model"], r["pixels"], r["devices"]) for r in rows} == {
        (model, pixels, devices) for model in ("SDXL", "Flux") for pixels in (1024, 2048, 3840) for devices in (2, 4, 8)
    }
    measured = [row for row in rows if "published_seconds" in row and row["model"] == "SDXL"]
    assert len(measured) == 9
    for row in measured:
        assert row["predicted_seconds"] == pytest.approx(row["published_seconds"], rel=0.1)
