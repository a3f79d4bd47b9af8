"""Blocks of attention: exact for what is kept, everything kept is dense attention, no row is ever empty."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from fastdiff.attention import Attention
from fastdiff.errors import BackendUnavailable
from fastdiff.parallel.attention import Intercept
from fastdiff.pipelines.sparse import blocks, install
from fastdiff.pipelines.sparse.blocks import attend_blocks, flex_mask
from fastdiff.pipelines.sparse.radial import radial
from fastdiff.pipelines.sparse.sparge import sparge

CPU = torch.device("cpu")
LENGTHS = [(64, 16), (150, 16), (33, 32), (7, 16)]  # tokens, block


def streams(tokens: int, seed: int = 0, batch: int = 2, heads: int = 3, channels: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, heads, tokens, channels, generator=generator, dtype=torch.float64) for _ in range(3)]


def table(tokens: int, block: int, density: float, seed: int = 1, batch: int = 2, heads: int = 3) -> Tensor:
    count = -(-tokens // block)
    drawn = torch.rand(batch, heads, count, count, generator=torch.Generator().manual_seed(seed)) < density
    return drawn | torch.eye(count, dtype=torch.bool)


def pairs(kept: Tensor, block: int, tokens: int) -> Tensor:
    """The table by tokens: 0 where a block is kept, else -inf."""
    seen = kept.repeat_interleave(block, -1).repeat_interleave(block, -2)[..., :tokens, :tokens]
    return torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -torch.inf)


@pytest.mark.parametrize(("tokens", "block"), LENGTHS)
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_kept_blocks_are_dense_attention_with_minus_infinity_elsewhere(tokens, block, density, monkeypatch):
    query, key, value = streams(tokens)
    kept = table(tokens, block, density)
    wanted = F.scaled_dot_product_attention(query, key, value, pairs(kept, block, tokens), scale=0.3)
    found = attend_blocks(query, key, value, kept, block, 0.3)
    assert (found - wanted).abs().max() < 1e-12
    monkeypatch.setattr(blocks, "_GATHERED", 1)  # rows one by one
    assert (attend_blocks(query, key, value, kept, block, 0.3) - wanted).abs().max() < 1e-12


def test_everything_kept_is_dense_attention():
    query, key, value = streams(150)
    wanted = F.scaled_dot_product_attention(query, key, value)
    everything = torch.ones(1, 1, 10, 10, dtype=torch.bool)  # a table for all heads
    assert (attend_blocks(query, key, value, everything, 16) - wanted).abs().max() < 1e-12


def test_blocks_that_are_left_out_are_not_multiplied(monkeypatch):
    """Counted at the kernel: its queries times keys are the kept pairs of tokens."""
    done: list[int] = []

    def counted(query: Tensor, key: Tensor, value: Tensor, **how: float) -> Tensor:
        done.append(query.shape[0] * query.shape[-2] * key.shape[-2])
        return query

    query, key, value = streams(160)
    kept = table(160, 16, 0.2)
    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    attend_blocks(query, key, value, kept, 16)
    assert sum(done) == int(kept.sum()) * 16 * 16


@pytest.mark.parametrize(("tokens", "block"), LENGTHS)
def test_flex_attention_reads_the_same_blocks(tokens, block):
    query, key, value = streams(tokens)
    kept = table(tokens, block, 0.3)
    mask = flex_mask(kept, block, tokens)
    made = create_block_mask(mask.mask_mod, 2, 3, tokens, tokens, device="cpu", BLOCK_SIZE=block)
    assert torch.equal(made.to_dense(), mask.to_dense()) and torch.equal(mask.to_dense().bool(), kept)
    found = flex_attention(query, key, value, block_mask=mask, scale=0.3)
    assert (found - attend_blocks(query, key, value, kept, block, 0.3)).abs().max() < 1e-12
    shared = flex_mask(kept[:1, :1], block, tokens)  # one table for all heads
    found = flex_attention(query, key, value, block_mask=shared, scale=0.3)
    assert (found - attend_blocks(query, key, value, kept[:1, :1], block, 0.3)).abs().max() < 1e-12


def chosen(tokens: int, text: slice = slice(0), **settings: float) -> Tensor:
    query, key, _ = streams(tokens)
    picture = (text.stop, tokens) if text.start == 0 else (0, text.start)
    return sparge(query, key, picture if text.stop else (0, tokens), Attention(sparse="sparge", **settings), None)


@pytest.mark.parametrize("settings", [{"keep": 1.0}, {"mass": 1.0}, {"keep": 0.01, "similarity": 1.0}], ids=str)
def test_sparge_keeps_everything_at_its_ends(settings):
    assert chosen(150, block=16, **settings).all()


def test_sparge_keeps_the_blocks_with_most_of_the_pooled_attention():
    """Against the formula, written out for each row."""
    query, key, _ = streams(150)
    kept = chosen(150, block=16, keep=0.3)
    by_mass = chosen(150, block=16, mass=0.6)
    means = [[x[1, 2, i : i + 16].mean(0) for i in range(0, 150, 16)] for x in (query, key)]
    for row, mean in enumerate(means[0]):
        shares = torch.softmax(torch.stack([mean @ other for other in means[1]]) * 8**-0.5, 0)
        order = shares.argsort(descending=True).tolist()
        assert set(kept[1, 2, row].nonzero().flatten().tolist()) == {*order[:3], row}
        fewest = next(n for n in range(1, 11) if shares[order[:n]].sum() >= 0.6)
        assert set(by_mass[1, 2, row].nonzero().flatten().tolist()) == {*order[:fewest], row}


def test_sparge_always_computes_blocks_whose_tokens_are_not_alike():
    query, key, _ = streams(64)
    query[:, :, 16:32] = query[:, :, 16:17]  # all of one direction
    key[:, :, 32:48] = key[:, :, 32:33]
    how = Attention(sparse="sparge", block=16, keep=0.01, similarity=0.9)
    kept = sparge(query, key, (0, 64), how, None)
    assert kept[..., [0, 2, 3], :].all() and kept[..., [0, 1, 3]].all() and not kept[..., 1, 2].all()


@pytest.mark.parametrize("text", [slice(0, 20), slice(130, 150)], ids=["text first", "text last"])
def test_text_is_always_attended_in_full(text):
    kept = chosen(150, text, block=16, keep=0.1)
    own = radial(150, (20, 150) if text.start == 0 else (0, 130), 13, 16, 0.01, CPU)
    with_text = [0, 1] if text.start == 0 else [8, 9]
    for found in (kept, own):
        assert found[..., with_text, :].all() and found[..., with_text].all() and not found.all()
        assert found.diagonal(dim1=-2, dim2=-1).all()


@pytest.mark.parametrize(("frames", "size", "block"), [(8, 32, 16), (5, 7, 4), (16, 64, 32), (2, 3, 16)])
def test_radial_goes_by_distance_in_frames_and_space(frames, size, block):
    """A window that halves with each doubling of the distance in frames; against the formula, pair by pair."""
    tokens, decay = frames * size, 0.95
    kept = radial(tokens, (0, tokens), frames, block, decay, CPU)[0, 0]
    for row in range(len(kept)):
        for column in range(len(kept)):
            ends = [(b * block, min(tokens, (b + 1) * block) - 1) for b in (row, column)]
            points = [(first, (first + last) // 2, last) for first, last in ends]
            seen = any(_seen(one, other, size, block, decay) for one in points[0] for other in points[1])
            assert bool(kept[row, column]) == (seen or row == column), (row, column)
    assert kept.diagonal().all() and kept[:, : size // block].all()


def _seen(one: int, other: int, size: int, block: int, decay: float) -> bool:
    distance = abs(one // size - other // size)
    if distance <= 1 or other < size:
        return True
    width = decay * size / 2 ** (distance.bit_length() - 1)
    apart = abs(one % size - other % size)
    return apart < width if width >= block else apart < block and distance % -(-block // width) == 0


def test_radial_keeps_everything_at_its_end_and_less_of_longer_videos():
    assert radial(512, (0, 512), 16, 16, 32.0, CPU).all()
    shares = [float(radial(n * 64, (0, n * 64), n, 16, 0.95, CPU).float().mean()) for n in (8, 32, 128)]
    assert shares[0] > 1.6 * shares[1] > 2.5 * shares[2]


def test_a_kernel_that_fails_or_is_wrong_is_refused(monkeypatch):
    monkeypatch.setattr(install, "attend", attend_blocks)
    install.probe(128, CPU, torch.float32)
    with pytest.raises(BackendUnavailable, match="multiples of 128"):
        install.probe(96, CPU, torch.float32)
    monkeypatch.setattr(install, "attend", lambda *given: attend_blocks(*given) + 1)
    with pytest.raises(BackendUnavailable, match=r"1\.0e\+00 off the reference"):
        install.probe(128, CPU, torch.float32)
    monkeypatch.setattr(install, "attend", lambda *given: 1 / 0)
    with pytest.raises(BackendUnavailable, match="division by zero"):
        install.probe(128, CPU, torch.float32)


@pytest.mark.slow
def test_compiled_flex_attention_inside_an_intercept_agrees():
    """As it runs on CUDA; here inductor's code for CPUs."""
    query, key, value = (x.float() for x in streams(400, batch=1, heads=2, channels=32))
    kept = table(400, 128, 0.3, batch=1, heads=2)
    mask = flex_mask(kept, 128, 400)
    with torch.no_grad(), Intercept(lambda *given: blocks._compiled()(*given, block_mask=mask)):
        found = F.scaled_dot_product_attention(query, key, value)
    assert (found - attend_blocks(query, key, value, kept, 128)).abs().max() < 1e-5
