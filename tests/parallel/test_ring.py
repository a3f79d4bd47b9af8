"""Parts of attention and their merge; ring, TokenRing and teams of heads on 2 to 5 real processes (circles.py)."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from fastdiff.parallel.partial import Part, attend_part, merge

from . import circles
from .asked import Asked

NAMES = {
    2: ("lengths", "teams", "pictures", "pictures_the_other_way", "with_caches_and_graphs", "under_way", "unequal"),
    3: ("lengths", "teams", "coded", "pictures", "pictures_the_other_way", "uneven_heads", "refusals"),
    4: ("lengths", "teams", "more_ranks_than_heads"),
    5: ("lengths", "teams"),
}
SLOW = {
    2: ("pictures_the_other_way", "with_caches_and_graphs"),
    3: ("pictures", "pictures_the_other_way", "uneven_heads"), 4: ("lengths", "teams", "more_ranks_than_heads"),
    5: ("lengths", "teams"),
}  # fmt: skip
CHECKS = Asked(circles, NAMES, SLOW)
told = CHECKS.told
ranks_meet = pytest.mark.xdist_group("rings")


@ranks_meet
@pytest.mark.parametrize(("ranks", "name"), CHECKS.cases, ids=str)
def test_check(ranks: int, name: str) -> None:
    CHECKS.agree(ranks, name)


@ranks_meet
def test_all_checks_run() -> None:
    CHECKS.all_run()


@ranks_meet
@pytest.mark.parametrize("ranks", [2, 3, *(pytest.param(count, marks=pytest.mark.slow) for count in (4, 5))])
def test_bytes_are_the_formula(ranks: int) -> None:
    """Keys and values go round once; queries, results and their weights too, and the text's results to everybody."""
    heads, one = 5, circles.BATCH * 8  # bytes of a number of each picture
    for rank, found in enumerate(told(ranks, "lengths")):
        for counts in circles.LENGTHS[ranks]:
            away = sum(counts) - counts[(rank + 1) % ranks]  # all but what the next rank has itself
            for text in (0, 3):
                kv = 2 * heads * circles.WIDTH * one * away
                assert found[f"ring {counts} {text}"][1] == kv
                guests, heard = sum(counts) - counts[rank], text * (ranks - 1)
                results = heads * (circles.WIDTH + 1) * one * (guests + heard)
                assert found[f"token_ring {counts} {text}"][1] == kv // 2 + results


@ranks_meet
def test_what_cannot_be_is_refused() -> None:
    for one in told(3, "refusals"):
        assert "parallel.ulysses = 2 does not divide the 3 patch ranks" in one["team"]
        assert "2 heads cannot be shared by 3 ranks; take method = ring with ulysses = 2 or less" in one["heads"]
        assert "ring cannot split a unet2d denoiser by rows" in one["rows"]
        assert "parallel.shares names 2 speeds, and there are 3 patch ranks" in one["speeds"]
        assert "parallel.shares = [2.0, 1.0, 0.0]: a speed is above 0" in one["nothing"]


@ranks_meet
def test_who_is_faster_has_more() -> None:
    first, second = told(2, "unequal")
    for name, found in first.items():
        assert found["sent"]["output"] >= 2 * second[name]["sent"]["output"], name


@ranks_meet
def test_blocks_are_under_way_while_another_is_computed() -> None:
    for one in told(2, "under_way"):
        assert len(one) == 2 * 2 * 5, "steps, halves of guidance, blocks"
        assert all(left < waited <= there for left, waited, there in one)


def far(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).abs().max())


def qkv(keys: int, dtype: torch.dtype = torch.float64, heads: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(keys)
    shapes = ((2, 4, 7, 16), (2, heads, keys, 16), (2, heads, keys, 16))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)]
)
@pytest.mark.parametrize("cuts", [(3, 10), (0, 13), (13, 0), (1, 1, 11), (4, 0, 0, 9)])
def test_parts_make_the_whole(cuts: tuple[int, ...], dtype: torch.dtype, bound: float) -> None:
    query, key, value = qkv(13, dtype)
    parts = [attend_part(query, k, v) for k, v in zip(key.split(cuts, 2), value.split(cuts, 2), strict=True)]
    found, backward = parts[0], parts[-1]
    for part, other in zip(parts[1:], parts[-2::-1], strict=True):
        found, backward = merge(found, part), merge(backward, other)
    wanted = F.scaled_dot_product_attention(query.double(), key.double(), value.double())
    assert far(found.out, wanted) < bound and far(backward.out, wanted) < bound
    scores = (query.double() @ key.double().mT) / 4
    assert far(found.lse, scores.logsumexp(-1)) < 3 * bound
    assert found.out.dtype == found.lse.dtype == torch.promote_types(dtype, torch.float32)


def test_what_sees_nothing_weighs_nothing() -> None:
    """A query whose keys are all masked in one part, in the other, and in both."""
    query, key, value = qkv(10)
    mask = torch.ones(7, 10, dtype=torch.bool)
    mask[0, :6] = mask[1, 6:] = mask[2] = False
    halves = [slice(0, 6), slice(6, 10)]
    parts = [attend_part(query, key[:, :, h], value[:, :, h], mask[:, h]) for h in halves]
    found, wanted = merge(*parts), F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    rows = [0, 1, 3, 4, 5, 6]
    assert far(found.out[:, :, rows], wanted[:, :, rows]) < 1e-14
    assert (found.out[:, :, 2] == 0).all() and (found.lse[:, :, 2] == -math.inf).all()
    added = torch.zeros(7, 10, dtype=torch.float64).masked_fill(~mask, -math.inf)
    again = merge(*(attend_part(query, key[:, :, h], value[:, :, h], added[:, h]) for h in halves))
    assert torch.equal(again.out, found.out)
    none = attend_part(query[:, :, :0], key, value)
    assert none.out.shape == (2, 4, 0, 16) and none.lse.shape == (2, 4, 0)
    nothing = attend_part(query, key[:, :, :0], value[:, :, :0])
    assert torch.equal(merge(nothing, nothing).out, torch.zeros_like(query))
    assert far(merge(nothing, found).out, found.out) == 0 == far(merge(found, nothing).out, found.out)


def test_a_mask_of_all_queries_and_fewer_heads_of_keys() -> None:
    query, key, value = qkv(10, heads=2)
    mask = torch.rand(2, 1, 1, 10, generator=torch.Generator().manual_seed(0)) > 0.3
    wanted = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True, scale=0.3)
    assert far(attend_part(query, key, value, mask, 0.3).out, wanted) < 1e-14


def test_without_a_fused_kernel_it_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Devices whose kernels do not return the log-sum-exp: tensors here say that they are on such a one."""
    query, key, value = qkv(10)
    mask = torch.ones(7, 10, dtype=torch.bool).tril(-1)
    for given in (None, mask):
        fused = attend_part(query, key, value, given)

        class Elsewhere(torch.Tensor):
            is_cpu = is_cuda = False
            __torch_function__ = torch._C._disabled_torch_function_impl

        found = attend_part(*(x.as_subclass(Elsewhere) for x in (query, key, value)), given)
        assert isinstance(found, Part) and far(found.out, fused.out) < 1e-14
        seen = fused.lse > -math.inf
        assert torch.equal(seen, found.lse > -math.inf) and far(found.lse[seen], fused.lse[seen]) < 1e-14
