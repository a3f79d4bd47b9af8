"""Every denoiser class of diffusers: described and checked against what its blocks do, or closed, or a part of one."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections import Counter
from functools import cache
from typing import Any

import diffusers.models.transformers
import diffusers.models.unets
import pytest
import torch
from diffusers import ModelMixin
from diffusers.hooks._helpers import TransformerBlockRegistry, _register_transformer_blocks_metadata
from diffusers.models.controlnets.controlnet_xs import UNetControlNetXSModel
from torch import nn

import fastdiff
from fastdiff.errors import UnsupportedModel
from fastdiff.pipelines.families import KNOWN, anatomies
from tests import zoo_denoisers, zoo_denoisers_clips, zoo_denoisers_unets
from tests.coverage.test_descriptions import cached_stack, left, streams
from tests.packaging.tree import ROOT
from tests.some import some
from tests.zoo import ZOO
from tests.zoo_loop import Denoiser, Loop

DENOISERS: dict[str, Denoiser] = zoo_denoisers.ZOO | zoo_denoisers_clips.ZOO | zoo_denoisers_unets.ZOO
UNETS = tuple(d.name for d in zoo_denoisers_unets.UNETS)
CLOSED = tuple(d.name for d in zoo_denoisers_unets.CLOSED)
STACKED = tuple(name for name in DENOISERS if name not in (*UNETS, *CLOSED))
PARTS = {
    "MotionAdapter": "layers that UNetMotionModel takes over",
    "TransformerTemporalModel": "a layer of UNets for video",
    "DreamLiteTransformer2DModel": "a layer of DreamLiteUNetModel",
    "MiniMaxMusic3RVQDepthDecoder": "writes tokens, one after the other",
}
UNTRIED = {
    "WanAnimate2Transformer3DModel": "closed, runs in modular pipelines only",
    "SanaWMLTX2RefinerTransformer3DModel": "closed",
    "RFD4ProteinaTransformer": "closed, and not of pictures",
    "UNetControlNetXSModel": "closed",
}
STEPS = 4


def classes() -> list[type[nn.Module]]:
    """All models in the folders of transformers and UNets."""
    found: list[type[nn.Module]] = [UNetControlNetXSModel]
    for package in (diffusers.models.transformers, diffusers.models.unets):
        for info in pkgutil.iter_modules(package.__path__):
            module = importlib.import_module(f"{package.__name__}.{info.name}")
            models = [c for c in vars(module).values() if inspect.isclass(c) and issubclass(c, ModelMixin)]
            found += [c for c in models if c.__module__ == module.__name__]
    return found


def described(kind: type[nn.Module]) -> str | None:
    return next((cls.__name__ for cls in kind.__mro__ if cls.__name__ in KNOWN), None)


def test_every_class_is_described_or_a_part_of_one():
    assert {kind.__name__ for kind in classes() if described(kind) is None} == PARTS.keys()


def test_every_description_is_tried_on_a_live_model():
    in_pipelines = {type(entry.denoiser(entry.make())).__name__ for entry in ZOO.values()}
    names = {described(kind) for kind in classes()} - {None}
    assert names - in_pipelines - DENOISERS.keys() == UNTRIED.keys()
    assert all(KNOWN[name].closed for name in UNTRIED)


def counted(module: nn.Module) -> tuple[Counter[str], list[Any]]:
    """Executions of each layer inside a module, which no method patches, and the hooks that count them."""
    ran: Counter[str] = Counter()
    layers = [(p, m) for p, m in module.named_modules() if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)]
    return ran, [layer.register_forward_hook(lambda *_, path=path: ran.update([path])) for path, layer in layers]


def inside(pipe: Loop) -> nn.Module:
    """What a cached step leaves out: the last described block, the middle of a UNet."""
    (anatomy,) = anatomies(pipe)
    if anatomy.family.kind == "unet":
        return pipe.transformer.mid_block
    return anatomy.blocks[-1] if anatomy.blocks else pipe.transformer


@pytest.mark.parametrize("name", STACKED)
def test_blocks_run_in_the_described_order_and_carry_the_described_streams(name):
    pipe = DENOISERS[name].make()
    (anatomy,) = anatomies(pipe)
    assert anatomy.recognised
    ran: list[nn.Module] = []

    def check(block: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        entered = streams(block, anatomy.stack_of(block).returns, args, kwargs)
        shapes = [(e.shape, out.shape) for e, out in zip(entered, left(output), strict=True) if out is not None]
        assert shapes and all(before == after for before, after in shapes)
        assert len({before for before, _ in shapes}) == len(shapes), "the test could not tell the streams apart"
        ran.append(block)

    for block in anatomy.blocks:
        block.register_forward_hook(check, with_kwargs=True)
    DENOISERS[name].draw(pipe, 2)
    assert ran == anatomy.blocks * 2


def test_streams_are_returned_as_diffusers_says():
    """diffusers' own caches keep where a block returns what; a second opinion on the order."""
    _register_transformer_blocks_metadata()
    seen = 0
    for name in STACKED:
        (anatomy,) = anatomies(DENOISERS[name].make())
        for block in anatomy.blocks:
            try:
                told = TransformerBlockRegistry.get(type(block))
            except ValueError:  # not of a kind that diffusers caches
                continue
            stack, seen = anatomy.stack_of(block), seen + 1
            assert stack.returns.index(stack.takes[0]) == told.return_hidden_states_index, name
            assert (told.return_encoder_hidden_states_index is not None) == (len(stack.returns) == 2), name
    assert seen > 30


@pytest.mark.parametrize("name", STACKED)
def test_a_cached_step_leaves_the_stack_with_its_own_input_and_the_residual_of_before(name):
    pipe = DENOISERS[name].make()
    before, after = cached_stack(pipe)
    DENOISERS[name].draw(pipe, 2)
    for own, entered, computed, served in zip(before[1], before[0], after[0], after[1], strict=True):
        if served is not None:
            assert torch.equal(served, own + (computed - entered))
    assert not all(map(torch.equal, *before)), "the live block saw the new latents"


def methods(name: str) -> dict[str, tuple[dict[str, Any], dict[str, Any], int]]:
    """Settings that skip nothing and that skip, and how often these compute what is inside."""
    of_all = {"static": ({"compute_steps": list(range(STEPS))}, {"compute_steps": [0, 2]}, 2)}
    if name in CLOSED:
        return of_all
    if name in UNETS:
        return of_all | {"deepcache": ({"interval": 1}, {"interval": 2}, 2)}
    of_stacks: dict[str, Any] = {
        "first_block": ({"threshold": 0}, {"threshold": 1e9}, 1),
        "taylorseer": ({"interval": 1}, {"interval": 2, "warmup_steps": 1}, 2),
    }
    return of_all | of_stacks


@pytest.mark.parametrize("name", some(DENOISERS, 2))
def test_neutral_is_identical_skipping_computes_less_and_restore_gives_the_plain_result(name):
    denoiser = DENOISERS[name]
    pipe = denoiser.make()
    plain = denoiser.draw(pipe, STEPS)
    for method, (neutral, aggressive, computed) in methods(name).items():
        with fastdiff.accelerate(pipe, cache={"method": method, **neutral}) as handle:
            assert torch.equal(denoiser.draw(pipe, STEPS), plain), method
            assert (handle.report.steps, handle.report.cached) == (STEPS, 0), method
        with fastdiff.accelerate(pipe, cache={"method": method, **aggressive}) as handle:
            ran, hooks = counted(inside(pipe))
            result = denoiser.draw(pipe, STEPS)
            assert (handle.report.steps, handle.report.cached) == (STEPS, STEPS - computed), method
            assert min(ran.values()) == computed, f"{method} leaves out what it says"
            assert torch.isfinite(result).all() and not torch.equal(result, plain), method
            for hook in hooks:
                hook.remove()
    assert torch.equal(denoiser.draw(pipe, STEPS), plain)


@pytest.mark.parametrize("name", [*CLOSED, "LatteTransformer3DModel"])
def test_what_needs_the_inside_of_a_closed_denoiser_is_refused_with_the_reason(name):
    pipe = DENOISERS[name].make() if name in DENOISERS else ZOO["latte"].make()
    for method in ("first_block", "fora", "deepcache"):
        with pytest.raises(UnsupportedModel) as refused:
            fastdiff.accelerate(pipe, cache=method)
        assert KNOWN[name].closed in str(refused.value) and "register_family" not in str(refused.value)


def row(name: str, pipelines: dict[str, list[str]]) -> str:
    """What docs/families.md says of a class."""
    family = KNOWN[name]
    short = {"hidden_states": "h", "encoder_hidden_states": "e"}
    written: dict[str, list[str]] = {}
    for stack in family.stacks:
        takes, returns = (" ".join(short.get(s, s) for s in names) for names in (stack.takes, stack.returns))
        written.setdefault(f"{takes} → {returns}", []).append(stack.path)
    inside = "; ".join(f"{', '.join(paths)}: {streams}" for streams, paths in written.items())
    inside = "UNet" if family.kind == "unet" else inside or f"closed: {family.closed}"
    tried = ", ".join(pipelines.get(name, [])) or ("a loop" if name in DENOISERS else "not tried")
    return f"| {name} | {family.name} | {inside} | {family.guidance} | {tried} |"


@cache
def classes_of_the_zoo() -> list[tuple[str, str]]:
    """Of each pipeline in it, and of its denoiser."""
    made = [(entry, entry.make()) for entry in ZOO.values()]
    return [(type(pipe).__name__, type(entry.denoiser(pipe)).__name__) for entry, pipe in made]


def rows() -> list[str]:
    pipelines: dict[str, list[str]] = {}
    for pipe, denoiser in classes_of_the_zoo():
        names = pipelines.setdefault(denoiser, [])
        names += [own for own in [pipe.removesuffix("Pipeline")] if own not in names]
    return [row(name, pipelines) for name in KNOWN]


@pytest.mark.xdist_group("zoo")  # where another test asks for the same classes
def test_the_docs_list_every_description_as_it_is():
    page = (ROOT / "docs/families.md").read_text(encoding="utf-8")
    listed = [line for line in page.splitlines() if line.startswith("| ") and line.split(" | ")[0][2:] in KNOWN]
    assert listed == rows()
    tried = len({pipe for pipe, _ in classes_of_the_zoo()})
    for page in ("README.md", "docs/index.md"):
        assert f"{tried} pipeline classes" in (ROOT / page).read_text(encoding="utf-8")
