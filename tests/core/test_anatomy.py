"""Denoisers as data: the families, recognition by structure, and the refusal that can be pasted."""

from __future__ import annotations

import inspect

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

import fastdiff
from fastdiff.anatomy import Anatomy, Family, Stack, recognise, stub
from fastdiff.caching.sites import stack_blocks
from fastdiff.errors import BadConfig, UnsupportedModel
from fastdiff.pipelines.families import FAMILIES, KNOWN, Families, anatomies
from tests import tiny
from tests.zoo import STACKED, ZOO

# Double and single blocks, refiners, spatial and temporal blocks
SEVERAL_LISTS = (
    "flux", "flux img2img", "flux fill", "flux kontext", "flux2", "chroma", "bria", "ovis", "auraflow", "lumina2",
    "z image", "hidream", "hunyuan video", "latte",
)  # fmt: skip


class Block(nn.Module):
    def forward(self, hidden_states, temb=None):
        return hidden_states


class JointBlock(nn.Module):
    def forward(self, hidden_states, encoder_hidden_states, temb=None):
        return encoder_hidden_states, hidden_states


class NamelessBlock(nn.Module):
    def forward(self, x, mask=None):
        return x if mask is None else x * mask


class Pair(nn.Module):
    """Two lists: which runs first, or whether they take turns, cannot be seen."""

    def __init__(self) -> None:
        super().__init__()
        self.early = nn.ModuleList(Block() for _ in range(2))
        self.late = nn.ModuleList(Block() for _ in range(2))


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
    anatomy = recognise(tiny.make(name).transformer, "transformer", {})
    assert anatomy.opaque and not anatomy.recognised and not anatomy.blocks
    assert not anatomy.family.batches and anatomy.family.tokens is None


def test_undescribed_blocks_of_one_stream_are_recognised():
    anatomy = recognise(Known(), "transformer", {})
    assert not anatomy.recognised and anatomy.family.stacks == (Stack("layers"),) and len(anatomy.blocks) == 3


@pytest.mark.filterwarnings("ignore:.*is not described")
@pytest.mark.parametrize("name", [n for n, entry in ZOO.items() if entry.method == "deepcache"])
def test_every_unet_is_recognised_without_its_description_and_caches_the_same(name, monkeypatch):
    entry, results = ZOO[name], []
    for known in (FAMILIES, Families({})):
        monkeypatch.setattr("fastdiff.pipelines.families.FAMILIES", known)
        pipe = entry.make()
        handle = fastdiff.accelerate(pipe, cache={"method": "deepcache", "interval": 2})
        results.append(entry.run(pipe, 4))
        assert handle.report.cached == 2
    assert torch.equal(*results)


def proposed(denoiser: nn.Module, monkeypatch: pytest.MonkeyPatch) -> Family:
    """The family that the stub of the refusal describes, pasted as it is."""
    with pytest.raises(UnsupportedModel, match="is not described") as refused:
        stack_blocks(recognise(denoiser, "transformer", {}))
    code = str(refused.value).partition("\n\n")[2]
    assert "register_family(" in code
    pasted: dict[str, Family] = {}
    monkeypatch.setattr("fastdiff.pipelines.register_family", pasted.__setitem__, raising=True)
    exec(compile(code, "stub", "exec"), {})
    return pasted[type(denoiser).__name__]


@pytest.mark.parametrize("name", [n for n, entry in ZOO.items() if entry.method != "deepcache"])
def test_what_needs_blocks_is_refused_without_their_description_and_the_stub_is_near(name, monkeypatch):
    """The stub proposes all that was described by hand, except where a block hides what it returns."""
    denoiser = ZOO[name].denoiser(ZOO[name].make())
    described, stub_says = KNOWN[type(denoiser).__name__].stacks, proposed(denoiser, monkeypatch).stacks
    assert {stack.path for stack in described} <= {stack.path for stack in stub_says}
    assert all(stack.takes and set(stack.returns) <= set(stack.takes) for stack in stub_says)
    if len(stub_says) == 1:
        assert stub_says[0].path == described[0].path and stub_says[0].returns == described[0].returns
        assert set(described[0].takes) <= set(stub_says[0].takes)


@pytest.mark.parametrize("name", [n for n in STACKED if n not in SEVERAL_LISTS])
def test_the_pasted_stub_of_a_model_with_one_list_works(name, monkeypatch):
    """A stub that takes a stream more than is returned (text that only informs the blocks) caches the same."""
    entry, pipe = ZOO[name], ZOO[name].make()
    denoiser = entry.denoiser(pipe)
    family = proposed(denoiser, monkeypatch)
    monkeypatch.setattr("fastdiff.pipelines.families.FAMILIES", Families({type(denoiser).__name__: family}))
    fastdiff.accelerate(pipe, cache={"method": "first_block", "threshold": 1e9})
    by_stub = entry.run(pipe, 3)
    monkeypatch.setattr("fastdiff.pipelines.families.FAMILIES", FAMILIES)
    pipe = entry.make()
    handle = fastdiff.accelerate(pipe, cache={"method": "first_block", "threshold": 1e9})
    assert torch.equal(entry.run(pipe, 3), by_stub) and handle.report.cached == 2


def test_two_lists_of_blocks_are_not_guessed(monkeypatch):
    assert [stack.path for stack in proposed(Pair(), monkeypatch).stacks] == ["early", "late"]


def test_a_stub_names_the_stream_as_the_block_does(monkeypatch):
    (stack,) = proposed(Known(NamelessBlock), monkeypatch).stacks
    assert stack == Stack("layers", takes=("x",), returns=("x",))


def test_a_stub_reads_the_order_of_the_returned_streams_from_the_source(monkeypatch):
    (stack,) = proposed(Known(JointBlock), monkeypatch).stacks
    assert stack.returns == ("encoder_hidden_states", "hidden_states")


def test_a_unet_whose_blocks_have_no_resnets_is_not_guessed():
    """Kandinsky 3 has the parts of a UNet by name, but other blocks."""
    unet = tiny.make("sd15").unet
    del unet.up_blocks[0].resnets
    assert recognise(unet, "unet", {}).opaque


@pytest.mark.parametrize("denoiser", [Known(JointBlock), Known(count=1), nn.Linear(2, 2)])
def test_a_refusal_prints_a_stub_that_can_be_pasted(denoiser, monkeypatch):
    with pytest.raises(UnsupportedModel) as refused:
        stack_blocks(recognise(denoiser, "transformer", {}))
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


def test_a_closed_denoiser_says_why():
    anatomy = Anatomy(Pair(), Family("pair", "transformer", closed="its blocks take turns"), "transformer")
    assert "pair has no stack: its blocks take turns; take a method" in str(anatomy.without("stack"))


def test_a_guessed_family_is_warned_about(monkeypatch):
    monkeypatch.setattr("fastdiff.pipelines.families.FAMILIES", Families({}))
    with pytest.warns(UserWarning, match="UNet2DConditionModel is not described.*structure"):
        assert fastdiff.accelerate(tiny.make("sd15"), cache="deepcache").active
