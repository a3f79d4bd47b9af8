"""A denoiser that nobody described: accepted for all that takes it as a whole, refused for what needs its inside."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, EulerDiscreteScheduler, ModelMixin
from torch import Tensor, nn

import fastdiff
from fastdiff.config import resolve
from fastdiff.errors import UnsupportedModel
from fastdiff.pipelines.calibrate import calibrate
from fastdiff.pipelines.families import Families, anatomies
from fastdiff.quant.components import components
from tests import tiny

FROM_OUTSIDE: dict[str, dict[str, Any]] = {
    "ab_cache": {"interval": 2, "warmup_steps": 1},
    "static": {"compute_steps": [0, 2, 4]},
    "taylorseer": {"lite": True, "interval": 2, "warmup_steps": 1},
    "easycache": {"threshold": 1e9, "warmup_steps": 3, "cooldown_steps": 0},
    "seacache": {"threshold": 1e9, "max_consecutive_cached": 1, "site": "output"},
}
FROM_INSIDE = ("first_block", "dbcache", "dicache", "teacache", "taylorseer", "fora", "pab", "deepcache", "a_sdm")
pytestmark = pytest.mark.filterwarnings("ignore:.*is not described")


@pytest.fixture(params=["pixart", "wan"])
def name(request, monkeypatch):
    """Nothing is known of these pipelines' denoisers, which take text into their blocks."""
    monkeypatch.setattr("fastdiff.pipelines.families.FAMILIES", Families({}))
    return request.param


@pytest.mark.parametrize("method", FROM_OUTSIDE)
def test_what_leaves_out_the_whole_model_works_as_on_a_described_one(name, method, monkeypatch):
    pipe, known = tiny.make(name), tiny.make(name)
    (anatomy,) = anatomies(pipe)
    assert anatomy.opaque and not anatomy.recognised
    handle = fastdiff.accelerate(pipe, cache={"method": method, **FROM_OUTSIDE[method]})
    found = tiny.run(pipe, name)
    assert handle.report.cached in (2, 3)
    handle.restore()
    monkeypatch.undo()
    assert torch.equal(tiny.run(pipe, name), tiny.run(known, name))
    fastdiff.accelerate(known, cache={"method": method, **FROM_OUTSIDE[method]})
    assert torch.equal(tiny.run(known, name), found)


@pytest.mark.parametrize("method", FROM_INSIDE)
def test_what_needs_the_inside_is_refused_with_the_entry_to_paste(name, method):
    pipe = tiny.make(name)
    with pytest.raises(UnsupportedModel, match="is not described: nobody told fastdiff of its") as refused:
        fastdiff.accelerate(pipe, cache=method)
    assert str(refused.value).count("register_family(") == 1
    assert not hasattr(pipe, "_fastdiff"), "nothing is installed"


def test_one_line_of_warning(name):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fastdiff.accelerate(tiny.make(name), cache="ab_cache")
    (line,) = [str(one.message) for one in said if "described" in str(one.message)]
    assert "\n" not in line and "treats it as a whole" in line


@pytest.mark.parametrize("lever", [{"quant": "w8a16"}, {"attention": {"backend": "native"}}], ids=("quant", "native"))
def test_levers_that_find_their_layers_themselves_work(name, lever):
    pipe = tiny.make(name)
    plain = tiny.run(pipe, name)
    with fastdiff.accelerate(pipe, cache={"method": "ab_cache", "interval": 1}, **lever) as handle:
        found = tiny.run(pipe, name)
        assert torch.isfinite(found).all() and handle.report.steps == 6
        assert torch.equal(found, plain) == ("attention" in lever)
    assert torch.equal(tiny.run(pipe, name), plain)


def test_pruning_which_leaves_out_parts_of_blocks_is_refused(name):
    with pytest.raises(UnsupportedModel, match=r"whose parts could be left out; leave out quant\.prune"):
        components(anatomies(tiny.make(name))[0])


def test_a_site_of_its_own_choice_is_the_whole_model(name):
    """`auto` is the block stack of a transformer; of one that nobody described it is the model's output."""
    config = resolve([("test", {"cache": {"method": "cachequant", "interval": 2}})]).config
    pipe = tiny.make(name)
    planned = calibrate(pipe, config, ["a cat"], num_inference_steps=6, **_small(name))
    handle = fastdiff.accelerate(pipe, planned)
    assert torch.isfinite(tiny.run(pipe, name)).all() and handle.report.cached == 3
    assert handle.config.cache.regions(anatomies(pipe)[0])[0].units == (tiny.denoiser(pipe),)


def _small(name: str) -> dict[str, Any]:
    known = tiny.arguments(name)
    return {k: v for k, v in known.items() if k not in ("prompt", "num_inference_steps", "generator", "output_type")}


class Constant(ModelMixin):
    """Its first argument is the same at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, prompt_ids: Tensor, noisy: Tensor, timestep: Tensor) -> Tensor:
        return self.layer(noisy) + prompt_ids.sum() * timestep / 1000


class Loop(DiffusionPipeline):
    def __init__(self, transformer: nn.Module, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)


@pytest.mark.parametrize("method", ["easycache", "seacache"])
def test_what_looks_at_the_latents_is_refused_where_nothing_tells_which_argument_they_are(method):
    """Text that never changes, taken for latents that do not move, would have every step left out."""
    pipe = Loop(Constant(), EulerDiscreteScheduler())
    with pytest.raises(UnsupportedModel, match="which argument of Constant holds the latents is not described"):
        fastdiff.accelerate(pipe, cache=method)
    assert fastdiff.accelerate(pipe, cache="ab_cache").active
