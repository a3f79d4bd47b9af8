"""Pruning: what is free is found, what is lost is repaired, and everything comes back."""

from __future__ import annotations

import json

import pytest
import torch

import fastdiff
from fastdiff.affine import decoded
from fastdiff.anatomy import Anatomy, Family
from fastdiff.errors import BadConfig
from fastdiff.patch import PatchSet
from fastdiff.pipelines.families import anatomies
from fastdiff.pipelines.quantize import quantize
from fastdiff.pipelines.quantized_files import save
from fastdiff.pipelines.quantized_parts import load_components
from fastdiff.quant.calls import Calls, swapped
from fastdiff.quant.components import components, roots
from fastdiff.quant.prune import Map, PruneOption, PrunePlan, Removal, Removed
from fastdiff.quant.pruning import _Fit, _forms, _repaired, within
from fastdiff.quant.standing import standing
from tests import tiny
from tests.quant.heard import hear, plan_pruning
from tests.state import differences, snapshot

PROMPTS = ["a red cat", "a dog"]


def arguments(name: str, steps: int = 4) -> dict:
    told = tiny.arguments(name, steps)
    for given in ("prompt", "negative_prompt", "generator", "output_type"):
        del told[given]
    return told | ({"negative_prompt": ["bad", "bad"]} if name == "flux" else {})


def last_layers(module: torch.nn.Module) -> torch.nn.Linear:
    return [m for m in module.modules() if isinstance(m, torch.nn.Linear)][-1]


def silence(pipe, path: str) -> None:
    """Let a feed-forward layer add nothing."""
    layer = last_layers(tiny.denoiser(pipe).get_submodule(path))
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.zero_()


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "flux", "pixart", "wan"])
def test_every_family_has_components_that_can_be_left_out(name):
    pipe = tiny.make(name)
    anatomy = anatomies(pipe)[0]
    calls = hear(pipe, PROMPTS, batch=2, moments=2, **arguments(name))
    found = components(anatomy)
    assert {c.kind for c in found} >= {"attention", "feed_forward"}
    assert all(0 <= c.depth < 1 for c in found)
    forms = _forms(anatomy, calls, found)
    assert {c.kind for c in forms} >= {"attention"}, "what runs is seen to run"
    for removals in {component.kind: removals for component, removals in forms.items()}.values():
        with swapped(anatomy.denoiser, {removal.path: Removed(removal) for removal in removals}):
            assert torch.isfinite(torch.tensor(calls.error()))
    assert calls.error() == 0, "the same modules are back"


@pytest.mark.parametrize(
    ("name", "path"),
    [("sd15", "up_blocks.1.attentions.0.transformer_blocks.0.ff"), ("sd3", "transformer_blocks.2.ff")],
)
def test_a_component_that_adds_nothing_is_removed_exactly(name, path):
    pipe = tiny.make(name)
    silence(pipe, path)
    calls = hear(pipe, PROMPTS, batch=2, moments=2, **arguments(name))
    before = snapshot(pipe)
    plan = plan_pruning(pipe, PROMPTS, max_error=1e-12, batch=2, moments=2, **arguments(name))
    assert not differences(before, snapshot(pipe)), "measuring changes nothing"
    assert path in [removal.path for removal in plan.removed]
    assert plan.error <= 1e-12
    assert {row.component for row in plan.measured} >= {path}
    anatomy = anatomies(pipe)[0]
    only = plan.model_copy(update={"removed": tuple(r for r in plan.removed if r.path == path)})
    patches = PatchSet()
    original = anatomy.denoiser.get_submodule(path)
    only.install(anatomy, patches.replace)
    assert isinstance(anatomy.denoiser.get_submodule(path), Removed)
    assert calls.error() < 1e-12
    patches.restore()
    assert anatomy.denoiser.get_submodule(path) is original
    assert not differences(before, snapshot(pipe))


def test_the_gate_holds_and_more_is_removed_where_more_is_allowed():
    pipe = tiny.make("sd15")
    call = arguments("sd15")
    strict, loose = (plan_pruning(pipe, PROMPTS, max_error=e, batch=2, moments=2, **call) for e in (1e-9, 0.3))
    assert strict.error <= 1e-9 and loose.error <= 0.3
    assert loose.parameters > strict.parameters
    paths = [removal.path for removal in loose.removed]
    assert len(set(paths)) == len(paths)
    assert not any(a != b and a.startswith(f"{b}.") for a in paths for b in paths), "nothing is inside what is gone"
    costs = {row.component: row for row in loose.measured}
    assert all(row.cost >= row.error for row in costs.values()), "the position prior only raises the cost"


@pytest.mark.parametrize(("name", "first"), [("sd15", "down_blocks.0."), ("flux", "transformer_blocks.0")])
def test_the_first_blocks_of_each_stack_are_protected(name, first):
    """Whatever they cost: all else may go, and what they hold is measured all the same."""
    pipe, call = tiny.make(name), {"batch": 2, "moments": 2, **arguments(name)}
    plan = plan_pruning(pipe, PROMPTS, max_error=1e9, protect=0.5, **call)
    assert plan.protected[0].startswith(first) and plan.removed and len(plan.protected) == len(set(plan.protected))
    assert not [r.path for r in plan.removed if within(r.path, plan.protected)]
    paths = [path for path, _ in roots(anatomies(pipe)[0])]
    stacks = {"flux": ("transformer_blocks.", "single_transformer_blocks.")}.get(name, ("",))
    for stack in stacks:
        own = [path for path in paths if path.startswith(stack)]
        assert [path for path in own if path in plan.protected] == own[: round(len(own) / 2)]
    everything = plan_pruning(pipe, PROMPTS, max_error=1e9, **call)
    assert everything.protected == () and everything.parameters > plan.parameters
    assert everything.measured == plan.measured
    assert PrunePlan.model_validate_json(plan.model_dump_json()) == plan


@pytest.mark.parametrize("prune", [None, "plan"])
def test_protecting_without_planning_is_refused(prune):
    prune = PrunePlan(denoiser="any") if prune else None
    with pytest.raises(BadConfig, match=r"protect = 0\.3 needs prune"):
        fastdiff.Config(quant={"method": "w8a16", "protect": 0.3, "prune": prune})
    with pytest.raises(BadConfig, match=r"protect"):
        fastdiff.Config(quant={"method": "w8a16", "protect": 1.0, "prune": 0.1})


@pytest.mark.parametrize("shape", [(64, 5, 6), (16, 6, 4, 4)])
@pytest.mark.parametrize("residual", [False, True])
def test_what_an_affine_or_low_rank_layer_added_is_repaired(shape, residual):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator) + 0.5
    width = shape[1] if len(shape) > 3 else shape[-1]
    mix = torch.randn(width, 2, generator=generator) @ torch.randn(2, width, generator=generator)
    scale, shift = torch.randn(width, generator=generator), torch.randn(width, generator=generator)
    rows = x.movedim(1, -1) if x.ndim > 3 else x
    for rank, made in ((0, rows * scale + shift), (2, rows @ mix + shift)):
        y = made.movedim(-1, 1) if x.ndim > 3 else made
        fit = _Fit(1e-9, rank)
        for a, b in zip(x.chunk(2), y.chunk(2), strict=True):
            fit.add(a, b)
        repair = Removal(path="here", residual=residual, wrapped=False, maps=(fit.solve(),))
        out = Removed(repair)(x)
        assert torch.allclose(out, x + y if residual else y, atol=1e-4)


class Adds(torch.nn.Module):
    """Adds what a component makes of four dimensions, channels where that has them."""

    def __init__(self, part: torch.nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states + self.part(hidden_states)


@pytest.mark.parametrize("part", [torch.nn.Linear(6, 6), torch.nn.Conv2d(6, 6, 1)], ids=["linear", "conv"])
def test_the_layers_inside_tell_which_dimension_holds_the_channels(part):
    """Four dimensions may be a picture's, or tokens in frames: a repair along the wrong one repairs nothing."""
    model = Adds(part.requires_grad_(False))
    anatomy = Anatomy(model, Family("adds", "transformer"), "transformer")
    calls, x = Calls(anatomy), torch.randn(8, 6, 6, 6, generator=torch.Generator().manual_seed(0))
    calls.given, calls.truth = [((x,), {})], [model(x)]
    repair = _repaired(anatomy, "part", False, calls, 1e-9, rank=6)
    assert torch.dist(Removed(repair)(x), part(x)) < 1e-3 * part(x).norm()
    assert Removal.model_validate_json(repair.model_dump_json()) == repair


def test_a_tuple_of_streams_is_given_back_as_a_tuple():
    nothing = torch.zeros(3)
    two = Removal(path="here", residual=False, wrapped=True, maps=(Map.of(nothing, nothing),) * 2)
    image, text = Removed(two)(hidden_states=torch.ones(1, 4, 3), encoder_hidden_states=torch.ones(1, 2, 3))
    assert image.shape == (1, 4, 3) and text.shape == (1, 2, 3) and not image.any() and not text.any()


def test_a_plan_is_one_json_file(tmp_path):
    from pydantic import TypeAdapter

    plan = plan_pruning(tiny.make("sd15"), PROMPTS, max_error=0.1, rank=2, batch=2, moments=2, **arguments("sd15"))
    file = tmp_path / "prune.json"
    file.write_text(plan.model_dump_json())
    option = TypeAdapter(PruneOption)
    assert option.validate_python(str(file)) == plan
    assert plan.removed[0].maps[0].down is not None
    assert len(decoded(plan.removed[0].maps[0].down)) == 2 * len(decoded(plan.removed[0].maps[0].scale))
    with pytest.raises(BadConfig, match="was made for UNet2DConditionModel"):
        plan.install(anatomies(tiny.make("sd3"))[0], PatchSet().replace)
    missing = plan.model_copy(
        update={"removed": (plan.removed[0].model_copy(update={"path": "up_blocks.9.resnets.0"}),)}
    )
    with pytest.raises(BadConfig, match=r"up_blocks\.9"):
        missing.install(anatomies(tiny.make("sd15"))[0], PatchSet().replace)
    for text, said in (("{", "truncated"), ("[]", "damaged"), (json.dumps({"version": 1}), "denoiser")):
        file.write_text(text)
        with pytest.raises(ValueError, match=said):
            option.validate_python(str(file))
    with pytest.raises(ValueError, match="does not exist"):
        option.validate_python(str(tmp_path / "nowhere.json"))
    assert isinstance(plan, PrunePlan)


def test_pruned_and_quantized_together(tmp_path):
    """As an option of a scheme: reversible on a live pipeline, gone from the files of one quantized for good."""
    call = arguments("sd3")
    pipe = tiny.make("sd3")
    silence(pipe, "transformer_blocks.2.ff")
    plan = plan_pruning(pipe, PROMPTS, max_error=1e-9, batch=2, moments=2, **call)
    assert "transformer_blocks.2.ff" in [removal.path for removal in plan.removed]
    config = fastdiff.Config(quant={"method": "w4a16", "prune": plan})
    before = snapshot(pipe)
    with fastdiff.accelerate(pipe, config):
        assert isinstance(pipe.transformer.transformer_blocks[2].ff, Removed)
        live = tiny.run(pipe, "sd3", steps=4)
    assert not differences(before, snapshot(pipe))
    quantize(pipe, config)
    assert torch.equal(tiny.run(pipe, "sd3", steps=4), live)
    save(pipe, tmp_path / "pruned")
    loaded = load_components(tmp_path / "pruned", torch.float32)["transformer"]
    assert isinstance(loaded.transformer_blocks[2].ff, Removed)
    kept = pipe.transformer.state_dict()
    assert not any(name.startswith("transformer_blocks.2.ff.net") for name in kept)
    assert kept.keys() == loaded.state_dict().keys()
    assert all(torch.equal(kept[name], t) for name, t in loaded.state_dict().items())
    with pytest.raises(BadConfig, match="prune plan was made for"):
        fastdiff.accelerate(tiny.make("pixart"), config)


def test_a_number_plans_and_removes_in_one_go():
    pipe = tiny.make("sd3")
    silence(pipe, "transformer_blocks.2.ff")
    config = {"quant": {"method": "w4a16", "prune": 3e-5, "protect": 0.4}}
    with pytest.raises(BadConfig, match="planned on prompts"):
        fastdiff.accelerate(pipe, config)
    with pytest.raises(BadConfig, match="give prompts"):
        quantize(pipe, config)
    report = quantize(pipe, config, PROMPTS, batch=2, **arguments("sd3"))
    assert isinstance(pipe.transformer.transformer_blocks[2].ff, Removed)
    assert any("removes transformer_blocks.2.ff" in note for note in report.notes)
    state = standing(pipe.transformer)
    assert state and state.method["prune"]["protected"] == ["transformer_blocks.0", "transformer_blocks.1"]
