"""A-SDM: which steps inherit, which sites do, and sites inside sites."""

from __future__ import annotations

import pytest
import torch

import fastdiff
from fastdiff.caching.methods.a_sdm import ASDM, Ranked
from fastdiff.errors import BadConfig, UnsupportedModel
from fastdiff.pipelines.calibrate import calibrate
from fastdiff.pipelines.families import anatomies
from tests import tiny
from tests.caching.fakes import ANYWHERE, did, run_of

STEPS = 10


def computed(**settings) -> list[int]:
    mask = ASDM(**settings).guarded_mask(run_of(STEPS), ANYWHERE)
    return [index for index, wanted in enumerate(mask) if wanted]


def test_the_modes_inherit_where_they_promise():
    assert computed(interval=3) == [0, 3, 6, 9]
    assert computed(sampling="window", window=(0.3, 0.8)) == [0, 1, 2, 8, 9]
    assert computed(sampling="dense_ends", interval=2, window=(0.3, 0.8)) == [0, 1, 2, 4, 6, 8, 9]
    assert computed(sampling="explicit", compute_steps=(0, 4, 5)) == [0, 4, 5]
    assert computed(sampling="explicit", compute_steps=(0, 8), of_steps=19) == [0, 4]
    assert computed(sampling="window", window=(0, 1), max_consecutive_cached=4) == [0, 5]
    assert computed(sampling="explicit") == [0]


def test_a_window_must_be_one():
    with pytest.raises(ValueError, match="two shares from 0 to 1, the smaller one first"):
        ASDM(window=(0.8, 0.3))


def names(**settings) -> list[str]:
    return [region.name for region in ASDM(**settings).regions(anatomies(tiny.make("sd15_two_layers"))[0])]


def test_sites_are_paths_with_wildcards():
    assert names(sites=("mid_block", "up_blocks.[01]")) == ["mid_block", "up_blocks.0", "up_blocks.1"]
    attentions = names(level="unit", sites=("*.attn1",))
    assert "mid_block.attentions.0.transformer_blocks.0.attn1" in attentions and len(attentions) == 16
    assert names(level="layer", sites=("up_blocks.2.*",)) == [f"up_blocks.2.attentions.{k}" for k in range(3)]
    assert "mid_block" in names() and "down_blocks.0" not in names(), "by default the inner half"
    assert all(name.endswith("attn2") for name in names(level="unit"))


@pytest.mark.parametrize("name", ["sd15", "sd3"])
def test_a_site_that_is_not_there_is_named_with_those_that_are(name):
    with pytest.raises(BadConfig, match=r"sites = \['upblock'\] matches no block of this model; they are \w+"):
        fastdiff.accelerate(tiny.make(name), cache={"method": "a_sdm", "sites": ["upblock"]})


def runs_of(pipe, paths: list[str]) -> dict[str, list[int]]:
    """How often a layer inside each path really ran."""
    counts: dict[str, list[int]] = {path: [] for path in paths}
    for path in paths:
        inside = pipe.unet.get_submodule(path)
        leaf = next(m for m in inside.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear))
        leaf.register_forward_hook(lambda *_, path=path: counts[path].append(1))
    return counts


def test_every_site_may_have_an_interval_of_its_own():
    pipe = tiny.make("sd15")
    counts = runs_of(pipe, ["mid_block", "up_blocks.0", "up_blocks.2"])
    cache = {
        "method": "a_sdm", "sites": ["mid_block", "up_blocks.0"], "interval": 2,
        "intervals": {"up_*": 5, "mid_block": 3},
    }  # fmt: skip
    fastdiff.accelerate(pipe, cache=cache)
    tiny.run(pipe, "sd15", steps=STEPS)
    assert {path: len(ran) for path, ran in counts.items()} == {"mid_block": 4, "up_blocks.0": 2, "up_blocks.2": STEPS}


def test_a_site_inside_another_keeps_what_it_gave_when_it_ran():
    """The inner one is entered only where the outer one is computed; where both are, both remember."""
    outer = "mid_block.attentions.0"
    inner = f"{outer}.transformer_blocks.0.attn2"
    pipe = tiny.make("sd15")
    counts = runs_of(pipe, [f"{inner}.to_q", f"{outer}.proj_in"])
    cache = {"method": "a_sdm", "level": "unit", "sites": [outer, inner], "intervals": {"*attn2": 4, "*": 2}}
    handle = fastdiff.accelerate(pipe, cache=cache)
    assert torch.isfinite(tiny.run(pipe, "sd15", steps=STEPS)).all()
    assert {path: len(ran) for path, ran in counts.items()} == {f"{inner}.to_q": 3, f"{outer}.proj_in": 5}
    assert did(handle) == [i in (0, 4, 8) for i in range(STEPS)]


def test_calibration_ranks_sites_by_time_and_takes_none_inside_another():
    pipe = tiny.make("sd15")
    config = fastdiff.Config(cache={"method": "a_sdm", "level": "unit", "time_share": 0.3})
    call = {"num_inference_steps": 3, "height": 64, "width": 64}
    made = calibrate(pipe, config, ["a red cat"], **call).cache
    shares = [share for _, share in made.plan.sites]
    assert shares == sorted(shares, reverse=True) and 0 < shares[0] < 1
    chosen = made.plan.first(0.3)
    assert sum(dict(made.plan.sites)[site] for site in chosen) >= 0.3
    assert not any(a != b and a.startswith(f"{b}.") for a in chosen for b in chosen)
    handle = fastdiff.accelerate(pipe, fastdiff.Config(cache=made))
    tiny.run(pipe, "sd15", steps=4)
    assert handle.report.cached == 2
    assert any("re-mapped" in note for note in handle.report.notes)


def test_the_sites_that_make_up_a_share():
    origin = {"denoiser": "x", "scheduler": "y", "sigmas": [1.0]}
    plan = Ranked(**origin, sites=[("a", 0.5), ("a.b", 0.4), ("c", 0.2), ("ab", 0.1)])
    assert plan.first(0.4) == ["a"] and plan.first(0.65) == ["a", "c"]
    assert plan.first(0.75) == ["a", "c", "ab"], "a name that only begins alike is not inside"
    assert plan.first(0) == []


def test_a_transformer_has_no_layers_between_its_blocks_and_their_units():
    with pytest.raises(UnsupportedModel, match="sd3 has no layers as A-SDM has them"):
        fastdiff.accelerate(tiny.make("sd3"), cache={"method": "a_sdm", "level": "layer"})
