"""Every family's description against what its blocks really do, and what a cached step puts in their place."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastdiff
from fastdiff.pipelines.families import anatomies
from tests.zoo import STACKED, ZOO

UNETS = tuple(name for name, entry in ZOO.items() if entry.method == "deepcache")


def streams(block: nn.Module, names: tuple[str, ...], args: tuple, kwargs: dict) -> list[Tensor]:
    order = list(inspect.signature(type(block).forward).parameters)[1:]
    given = dict(zip(order, args, strict=False)) | kwargs
    return [given[name] for name in names]


def left(output: Any) -> list[Tensor | None]:
    """Streams that a block returned."""
    return list(output) if isinstance(output, tuple) else [output]


@pytest.mark.parametrize("name", STACKED)
def test_blocks_run_in_the_described_order_and_carry_the_described_streams(name):
    entry = ZOO[name]
    pipe = entry.make()
    (anatomy,) = anatomies(pipe)
    assert anatomy.component == entry.deep.partition(".")[0]
    ran: list[nn.Module] = []

    def check(block: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        stack = anatomy.stack_of(block)
        entered = streams(block, stack.returns, args, kwargs)
        shapes = [(e.shape, out.shape) for e, out in zip(entered, left(output), strict=True) if out is not None]
        assert shapes and all(before == after for before, after in shapes)
        assert len({before for before, _ in shapes}) == len(shapes), "the test could not tell the streams apart"
        ran.append(block)

    for block in anatomy.blocks:
        block.register_forward_hook(check, with_kwargs=True)
    entry.run(pipe, 2)
    assert ran == anatomy.blocks * 2 * entry.calls


def cached_stack(pipe: Any) -> tuple[list[list[Tensor]], list[list[Tensor | None]]]:
    """What enters the cached blocks, and what leaves them, in the calls to come; the first block always runs."""
    (anatomy,) = anatomies(pipe)
    first, last = anatomy.blocks[1], anatomy.blocks[-1]
    returned = anatomy.stack_of(last).returns
    before: list[list[Tensor]] = []
    after: list[list[Tensor | None]] = []
    fastdiff.accelerate(pipe, cache={"method": "first_block", "threshold": 1e9})
    first.register_forward_pre_hook(
        lambda block, args, kwargs: before.append([s.clone() for s in streams(block, returned, args, kwargs)]),
        with_kwargs=True,
    )
    last.register_forward_hook(lambda _block, _args, output: after.append(left(output)))
    return before, after


@pytest.mark.parametrize("name", STACKED)
def test_a_cached_step_leaves_the_stack_with_its_own_input_and_the_residual_of_before(name):
    entry = ZOO[name]
    pipe = entry.make()
    before, after = cached_stack(pipe)
    entry.run(pipe, 2)
    for branch in range(entry.calls):
        computed, cached = branch, branch + entry.calls
        for k, out in enumerate(after[cached]):
            if out is not None:
                expected = before[cached][k] + (after[computed][k] - before[computed][k])
                assert torch.equal(out, expected)
                assert not torch.equal(before[cached][k], before[computed][k]), "the live blocks saw the new latents"


@pytest.mark.parametrize("name", ZOO)
def test_guidance_reaches_the_denoiser_as_described(name):
    entry = ZOO[name]
    (anatomy,) = anatomies(entry.make())
    if entry.calls == 2:
        assert anatomy.family.guidance == "calls"
    elif "negative_prompt_embeds" in entry.arguments() or "negative_prompt" in entry.arguments():
        assert anatomy.family.guidance == "batch"


def skip_channels(unet: nn.Module) -> list[int]:
    """Channels of skip connection 0, 1, 2... counted from the outside."""
    config, channels = unet.config, unet.config.block_out_channels
    found = [channels[0]]
    for k, width in enumerate(channels):
        found += [width] * config.layers_per_block + [width] * (k < len(channels) - 1)
    return found


@pytest.mark.parametrize("name", [name for name in UNETS if name not in ("sd15", "sdxl", "audioldm2")])
def test_deepcache_reuses_only_the_feature_at_every_branch(name):
    """What meets a skip connection is the last computed feature; the skip connection itself is new."""
    entry = ZOO[name]
    skips = skip_channels(entry.make().unet)
    for branch, width in enumerate(skips[:-1]):
        pipe = entry.make()
        fastdiff.accelerate(pipe, cache={"method": "deepcache", "interval": 2, "branch": branch})
        layers = [layer for block in pipe.unet.up_blocks for layer in block.resnets]
        assert len(layers) == len(skips)
        met: list[Tensor] = []
        layers[-1 - branch].register_forward_pre_hook(
            lambda layer, args, kwargs, met=met: met.append(streams(layer, (first_argument(layer),), args, kwargs)[0]),
            with_kwargs=True,
        )
        assert torch.isfinite(entry.run(pipe, 4)).all()
        features, new = zip(*((x[:, :-width], x[:, -width:]) for x in met), strict=True)
        assert torch.equal(features[0], features[1]) and torch.equal(features[2], features[3])
        assert not torch.equal(features[1], features[2]) and not torch.equal(new[0], new[1])


def first_argument(module: nn.Module) -> str:
    return list(inspect.signature(type(module).forward).parameters)[1]
