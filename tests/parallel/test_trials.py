"""Methods that were tried and not shipped: their formulas, so that what was measured is what the papers say."""

from __future__ import annotations

from collections.abc import Callable

import diffusers
import pytest
import torch
from torch import Tensor, nn

from scripts.trial_chords import Hierarchy, jump_of, on_cores, rivals, starts_of
from scripts.trial_slabs import in_slabs, placed, spans, weights

TOTAL = 20
GRID = torch.linspace(1, 0, TOTAL + 1, dtype=torch.float64) ** 1.5


def jump(x: Tensor, output: Tensor, start: int, end: int) -> Tensor:
    return x + (GRID[end] - GRID[start]) * output


def solved(starts: tuple[int, ...], field: Callable[[Tensor, int], Tensor], x: Tensor) -> Tensor:
    cores = Hierarchy(jump, starts, TOTAL)
    for _, index in cores.order:
        x = cores.next(x, field(x, index))
    return x


def plain(field: Callable[[Tensor, int], Tensor], x: Tensor) -> list[Tensor]:
    found = [x]
    for index in range(TOTAL):
        found.append(jump(found[-1], field(found[-1], index), index, index + 1))
    return found


def bent(x: Tensor, index: int) -> Tensor:
    return torch.sin(3 * x) + 0.3 * index


def latents() -> Tensor:
    return torch.randn(7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_one_core_is_the_solver() -> None:
    assert torch.equal(solved((0,), bent, latents()), plain(bent, latents())[-1])


@pytest.mark.parametrize("starts", [(0, 9), (0, 3, 8, 13)])
def test_cores_agree_where_jumps_are_right(starts: tuple[int, ...]) -> None:
    """An output that depends on nothing makes one jump as good as many steps."""
    slope = latents()
    found = solved(starts, lambda x, _: slope, latents())
    assert torch.allclose(found, plain(lambda x, _: slope, latents())[-1], rtol=0, atol=1e-13)


def test_two_cores_by_the_definition() -> None:
    begin, exact = 5, plain(bent, latents())
    x = jump(exact[0], bent(exact[0], 0), 0, begin)
    start, first = begin, x
    for index in range(begin, TOTAL):
        after, before = jump(x, bent(x, index), index, index + 1), 1 + index - begin  # where the first core is
        if before == start:
            y = exact[start]
            right, wrong = (jump(z, bent(z, start), start, index + 1) for z in (y, first))
            after, start = after + right - wrong, index + 1
            first = after
        x = after
    found = solved((0, begin), bent, latents())
    assert torch.allclose(found, x, rtol=0, atol=1e-13)
    assert (found - exact[-1]).norm() < (solved((0, 15), bent, latents()) - exact[-1]).norm()


def test_rounds_are_those_that_are_compared() -> None:
    for cores, rounds in ((2, 27), (4, 16)):
        for starts in starts_of(cores, rounds).values():
            hierarchy = Hierarchy(jump, starts, 50)
            assert hierarchy.rounds == rounds and len(starts) == cores
            assert max(index for _, index in hierarchy.order) == 49
    for row in rivals("shapes-dit", 4):
        warmup = row["parallel"]["warmup_steps"]
        assert warmup + -(-(50 - warmup) // 4) == row["rounds"]


@pytest.mark.parametrize("name", ["ddim", "flow"])
def test_a_jump_of_one_step_is_the_schedulers(name: str) -> None:
    scheduler = (
        diffusers.FlowMatchEulerDiscreteScheduler()
        if name == "flow"
        else diffusers.DDIMScheduler(
            prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False, timestep_spacing="trailing"
        )
    )
    x, output = latents().float(), latents().flip(0).float()
    scheduler.set_timesteps(10)
    one, two, far = on_cores(scheduler, (0,)), on_cores(scheduler, (0, 5)), jump_of(scheduler)
    for cores in (one, two):
        cores.set_timesteps(10)
    assert torch.equal(one.timesteps, scheduler.timesteps) and len(two.timesteps) == 6 + 5
    first = two.step(output, two.timesteps[0], x)[0]
    assert torch.equal(first, far(x, output, 0, 1)), "in the second round the first core goes on"
    assert torch.equal(two.step(output, two.timesteps[1], first)[0], far(x, output, 0, 5)), "and the second begins"
    for index, time in enumerate(scheduler.timesteps):
        wanted = scheduler.step(output, time, x, return_dict=False)[0]
        assert torch.allclose(far(x, output, index, index + 1), wanted, rtol=0, atol=2e-6)


def test_slabs_cover_the_latents_and_count_as_one() -> None:
    assert spans(16, 4, 0.5, 2) == [(0, 6), (2, 10), (6, 14), (10, 16)] and spans(16, 1, 1.0, 2) == [(0, 16)]
    for slabs, overlap in ((2, 0.5), (4, 1.0), (3, 0.0)):
        parts, total = spans(24, slabs, overlap, 4), torch.zeros(24, dtype=torch.float64)
        for (begin, end), weight in zip(parts, weights(24, parts), strict=True):
            total[begin:end] += weight
        assert torch.allclose(total, torch.ones_like(total), rtol=0, atol=1e-15)


def test_slabs_of_what_looks_nowhere_else_are_the_whole() -> None:
    x = torch.randn(2, 3, 16, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    seen: list[tuple[int, ...]] = []

    def forward(x: Tensor) -> tuple[Tensor]:
        seen.append(tuple(x.shape[2:]))
        return (torch.sin(x),)

    cut = in_slabs(forward, None, 2, 0.5, 2)
    for _ in range(3):
        assert torch.allclose(cut(x)[0], torch.sin(x), rtol=0, atol=1e-15)
    assert seen[::2] == [(12, 12), (16, 10), (12, 12)], "each step along another dimension"


def test_slabs_have_the_places_of_the_whole_picture() -> None:
    class Denoiser(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pos_embed = diffusers.models.embeddings.PatchEmbed(32, 32, 2, 4, 8, pos_embed_max_size=16)

    denoiser, x = Denoiser(), torch.zeros(1, 4, 16, 12)
    whole = denoiser.pos_embed.cropped_pos_embed(16, 12).unflatten(1, (8, 6))
    with placed(denoiser, x, 3, 4, 10):
        assert torch.equal(denoiser.pos_embed.cropped_pos_embed(16, 6), whole[:, :, 2:5].flatten(1, 2))
    assert torch.equal(denoiser.pos_embed.cropped_pos_embed(16, 12), whole.flatten(1, 2))
