"""FlexRound on blocks: it starts where layers end, keeps only what is better, and leaves no trace on the model."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import fastdiff
from fastdiff.errors import BadConfig
from fastdiff.patch import PatchSet
from fastdiff.pipelines.families import anatomies
from fastdiff.pipelines.planning import learned_by
from fastdiff.quant.activations import Present
from fastdiff.quant.build import chosen
from fastdiff.quant.calls import relative
from fastdiff.quant.components import roots
from fastdiff.quant.divisors import Divided
from fastdiff.quant.flexround import FlexRound
from fastdiff.quant.install import QuantReport, quantize_model
from fastdiff.quant.packing import FORMATS
from fastdiff.quant.recipe import Recipe
from fastdiff.quant.reconstruct import Reconstruction, heard, together
from fastdiff.quant.schemes.w4a16 import W4A16
from tests import tiny
from tests.quant.heard import hear
from tests.quant.test_prune import PROMPTS, arguments
from tests.state import differences, snapshot

METHOD = W4A16(rounding="flexround", group_size=32)


class Block(nn.Module):
    """Two layers with a bend between them, on two streams."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, hidden_states: torch.Tensor, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        inner = nn.functional.gelu(self.first(hidden_states))
        return hidden_states + scale * self.second(inner), inner.mean(-1)


def records(block: nn.Module, seed: int, count: int = 4):
    mix = torch.randn(16, 16, generator=torch.Generator().manual_seed(0)) / torch.arange(1, 17)
    generator = torch.Generator().manual_seed(seed)
    xs = [torch.randn(64, 16, generator=generator) @ mix for _ in range(count)]
    with torch.no_grad():
        return [((x,), {"scale": 2.0}, list(block(x, scale=2.0))) for x in xs]


def divided(block: nn.Module, recipe: Recipe) -> dict[str, Divided]:
    return {name: Divided(getattr(block, name).weight.detach(), recipe) for name in ("first", "second")}


def test_all_layers_of_a_block_are_learned_on_what_it_gives():
    torch.manual_seed(1)
    block = Block()
    before = dict(block.named_parameters())
    copies = {name: one.detach().clone() for name, one in before.items()}
    layers = divided(block, Recipe("int4", group=16))

    def off(some) -> float:
        quantized = Block()
        quantized.load_state_dict({**block.state_dict(), **{f"{n}.weight": one.kept() for n, one in layers.items()}})
        with torch.no_grad():
            pairs = [(quantized(x, **kw), wanted) for (x,), kw, wanted in some]
        return sum(relative(a, b) for found, to in pairs for a, b in zip(found, to, strict=True))

    fresh = records(block, 4)
    plain = off(fresh)
    together(block, layers, records(block, 2), records(block, 3), 200, 3e-3)
    assert off(fresh) < 0.8 * plain
    after = dict(block.named_parameters())
    assert all(after[name] is before[name] and torch.equal(after[name], copies[name]) for name in before)
    assert all(parameter.grad is None for parameter in after.values())
    for one in layers.values():
        assert torch.equal(one.kept(), FORMATS["int4"].unpack(one.tensors(), one.weight.shape[1])), "as it is stored"


def test_what_is_not_better_on_other_calls_is_not_kept():
    torch.manual_seed(1)
    block = Block()
    layers = divided(block, Recipe("int8"))
    start = {name: one.kept() for name, one in layers.items()}
    wrong = [(args, kw, [-t for t in wanted]) for args, kw, wanted in records(block, 2)]
    together(block, layers, wrong, records(block, 3), 60, 3e-2)
    assert all(torch.equal(one.kept(), start[name]) for name, one in layers.items())


@pytest.fixture(scope="module")
def pipe():
    return tiny.make("sd15")


@pytest.fixture(scope="module")
def calls(pipe):
    return hear(pipe, PROMPTS, batch=2, moments=2, **arguments("sd15"))


def middle(calls) -> W4A16:
    """The method for the layers of the middle block alone."""
    others = (f.name for f, _ in chosen(METHOD, calls.anatomy.denoiser) if not f.name.startswith("mid_block"))
    return METHOD.model_copy(update={"skip": tuple(others)})


def reconstruction(calls, steps: int, **how) -> Reconstruction:
    anatomy = calls.anatomy
    some = chosen(middle(calls), anatomy.denoiser)
    return Reconstruction(FlexRound(calls, steps=20), some, dict(roots(anatomy)), steps=steps, **how)


def stored(calls, learner) -> dict[str, torch.Tensor]:
    """What a learner makes of the layers, each of which sees those before it as they are stored."""
    denoiser, report = calls.anatomy.denoiser, QuantReport("w4a16")
    with PatchSet() as patches:
        quantize_model(denoiser, "unet", middle(calls), patches.replace, Present(), report, learned=learner)
        layers = dict(denoiser.named_modules())
        found = {f"{one.name}.{k}": t for one in report.layers for k, t in layers[one.name].tensors().items()}
        patches.restore()
    return found


def test_no_step_is_what_was_learned_layer_by_layer_bit_for_bit(pipe, calls):
    before = snapshot(pipe)
    plain, none = stored(calls, FlexRound(calls, steps=20)), stored(calls, reconstruction(calls, 0))
    assert plain.keys() == none.keys() and all(torch.equal(plain[key], none[key]) for key in plain)
    some = stored(calls, reconstruction(calls, 20))
    assert any(not torch.equal(plain[key], some[key]) for key in plain), "and steps change something"
    assert differences(before, snapshot(pipe)) == []
    assert calls.error() == 0


def test_a_block_keeps_as_many_calls_as_there_is_room_for(calls):
    path, block = next(iter(roots(calls.anatomy)))
    found = list(heard(block, calls))
    each = sum(t.nbytes for t in tree_leaves(found[0]) if isinstance(t, torch.Tensor))
    assert len(found) == len(calls.given) == 2
    for most, kept in ((1 << 30, 2), (4 * each, 2), (4 * each - 1, 1), (2 * each, 1)):
        assert len(list(reconstruction(calls, 0, most=most).records(path, calls))) == kept
    with pytest.raises(BadConfig, match="calibrate with fewer prompts"):
        list(reconstruction(calls, 0, most=2 * each - 1).records(path, calls))


def test_the_option_is_told_where_it_has_nothing_to_do(calls):
    for settings in ({}, {"rounding": "flexround", "low_rank": 2}):
        with pytest.raises(BadConfig, match="reconstruct = block is of rounding = flexround"):
            fastdiff.Config(quant={"method": "w4a16", "reconstruct": "block", **settings})
    method = METHOD.model_copy(update={"reconstruct": "block"})
    found = learned_by(method, {"unet": calls})["unet"]
    assert isinstance(found, Reconstruction) and found.blocks.keys() == dict(roots(calls.anatomy)).keys()
    assert isinstance(learned_by(METHOD, {"unet": calls})["unet"], FlexRound)


@pytest.mark.slow
def test_a_pipeline_is_quantized_with_less_output_error():
    errors = {}
    for over in ("layer", "block"):
        pipe = fastdiff.load("shapes-unet")
        pipe.set_progress_bar_config(disable=True)
        quant = {
            "method": "w4a16",
            "rounding": "flexround",
            "reconstruct": over,
            "skip": ["up_blocks*", "down_blocks*"],
        }
        report = fastdiff.quantize(pipe, {"quant": quant}, ["a large red circle", "a small green ring"], batch=2,
                                   num_inference_steps=10)  # fmt: skip
        errors[over] = report.output_error
        assert anatomies(pipe)[0].denoiser is pipe.unet
    assert errors["block"] < errors["layer"]
