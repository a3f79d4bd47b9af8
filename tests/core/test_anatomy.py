"""Denoisers as data: the families, recognition by structure, and the refusal that can be pasted."""

from __future__ import annotations

import inspect

import pytest
from diffusers import UNet2DConditionModel
from torch import nn

import fastdiff
from fastdiff.anatomy import Anatomy, Family, Stack, recognise, stub
from fastdiff.errors import BadConfig, UnsupportedModel
from fastdiff.pipelines.families import FAMILIES, KNOWN, Families, anatomies
from tests import tiny


class Block(nn.Module):
    def forward(self, hidden_states, temb=None):
        return hidden_states


class JointBlock(nn.Module):
    def forward(self, hidden_states, encoder_hidden_states, temb=None):
        return encoder_hidden_states, hidden_states


class Known(nn.Module):
    """Blocks of one stream: everything can be seen from outside."""

    def __init__(self, block: type[nn.Module] = Block, count: int = 3) -> None:
        super().__init__()
        self.embed = nn.Linear(2, 2)
        self.layers = nn.ModuleList(block() for _ in range(count))


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_every_tiny_pipeline_has_a_family_and_its_description_is_true(name):
    pipe = tiny.make(name)
    (anatomy,) = anatomies(pipe)
    assert anatomy.recognised and anatomy.denoiser is tiny.denoiser(pipe)
    assert anatomy.component == ("unet" if name in tiny.UNETS else "transformer")
    assert (anatomy.family.guidance == "calls") == (name in tiny.TWO_CALLS)
    assert (anatomy.family.kind == "unet") == (name in tiny.UNETS) == (not anatomy.blocks)
    ran: list[nn.Module] = []
    for block in anatomy.blocks:
        stack = anatomy.stack_of(block)
        accepted = inspect.signature(type(block).forward).parameters
        assert set(stack.takes) <= set(accepted)
        block.register_forward_hook(lambda module, _args, out: ran.append((module, out)))
    tiny.run(pipe, name, steps=1, **tiny.guidance_off(name))
    assert [module for module, _ in ran] == anatomy.blocks, "blocks are listed in the order in which they run"
    for block, output in ran:
        streams = output if isinstance(output, tuple) else (output,)
        assert len(streams) == len(anatomy.stack_of(block).returns)


@pytest.mark.parametrize("name", [n for n in tiny.TRANSFORMERS if n != "pixart"])
def test_the_streams_are_returned_in_the_described_order(name):
    """hidden_states has as many tokens as the latents make, encoder_hidden_states as many as the prompt."""
    pipe = tiny.make(name)
    (anatomy,) = anatomies(pipe)
    shapes = []

    def keep(block, args, kwargs, output):
        order = list(inspect.signature(type(block).forward).parameters)[1:]
        given = dict(zip(order, args, strict=False)) | kwargs
        stack = anatomy.stack_of(block)
        streams = output if isinstance(output, tuple) else (output,)
        shapes.extend((given[s].shape, o.shape) for s, o in zip(stack.returns, streams, strict=True) if o is not None)

    for block in anatomy.blocks:
        block.register_forward_hook(keep, with_kwargs=True)
    tiny.run(pipe, name, steps=1, **tiny.guidance_off(name))
    assert shapes and all(before == after for before, after in shapes)


def test_a_subclass_belongs_to_the_family_of_its_base():
    class Finetuned(UNet2DConditionModel):
        pass

    unet = tiny.make("sd15").unet
    unet.__class__ = Finetuned
    assert recognise(unet, "unet", FAMILIES).family is KNOWN["UNet2DConditionModel"]


def test_an_undescribed_unet_is_recognised_by_its_parts():
    unet = tiny.make("sd15").unet
    anatomy = recognise(unet, "unet", {})
    assert anatomy.family.kind == "unet" and not anatomy.recognised


@pytest.mark.parametrize("name", ["wan", "pixart"])
def test_undescribed_blocks_with_a_text_stream_are_not_guessed(name):
    """They may return one stream or two, in either order: a wrong guess would be a wrong picture."""
    with pytest.raises(UnsupportedModel, match="is not described"):
        recognise(tiny.make(name).transformer, "transformer", {})


def test_undescribed_blocks_of_one_stream_are_recognised():
    anatomy = recognise(Known(), "transformer", {})
    assert not anatomy.recognised and anatomy.family.stacks == (Stack("layers"),) and len(anatomy.blocks) == 3


@pytest.mark.parametrize("denoiser", [Known(JointBlock), Known(count=1), nn.Linear(2, 2)])
def test_a_refusal_prints_a_stub_that_can_be_pasted(denoiser, monkeypatch):
    with pytest.raises(UnsupportedModel) as refused:
        recognise(denoiser, "transformer", {})
    sentence, _, code = str(refused.value).partition("\n\n")
    assert type(denoiser).__name__ in sentence and code == stub(denoiser)
    registered = {}
    monkeypatch.setattr("fastdiff.pipelines.register_family", registered.__setitem__, raising=True)
    exec(compile(code, "stub", "exec"), {})
    family = registered[type(denoiser).__name__]
    assert isinstance(family, Family) and family.kind == "transformer"
    if isinstance(denoiser, Known) and len(denoiser.layers) > 1:
        assert family.stacks[0].path == "layers" and family.stacks[0].takes == (
            "hidden_states",
            "encoder_hidden_states",
        )
        assert recognise(denoiser, "transformer", registered).blocks == list(denoiser.layers)


def test_a_family_can_be_registered_once():
    families = Families(KNOWN)
    families.register("Known", Family("known", "transformer", (Stack("layers"),)))
    assert recognise(Known(), "transformer", families).recognised
    with pytest.raises(BadConfig, match="Known is described already, as known"):
        families.register("Known", Family("other", "transformer"))


def test_a_block_of_no_stack_is_refused():
    anatomy = Anatomy(Known(), Family("known", "transformer", (Stack("layers"),)), "transformer")
    with pytest.raises(UnsupportedModel, match="Block is in no block stack of known"):
        anatomy.stack_of(Block())


def test_a_pipeline_without_a_denoiser_is_refused_in_one_sentence():
    class Nothing:
        scheduler = None

    with pytest.raises(UnsupportedModel, match="Nothing has no denoiser with a scheduler"):
        anatomies(Nothing())


def test_a_guessed_family_is_warned_about(monkeypatch):
    monkeypatch.setattr("fastdiff.pipelines.families.FAMILIES", Families({}))
    with pytest.warns(UserWarning, match="UNet2DConditionModel is not described.*structure"):
        assert fastdiff.accelerate(tiny.make("sd15"), cache="deepcache").active
