"""Radial Attention: O(n log n) Sparse Attention with Energy Decay for Long Video Generation.
Paper: https://arxiv.org/abs/2506.19852 (2025)."""

from __future__ import annotations

import torch
from torch import Tensor


def radial(
    tokens: int, picture: tuple[int, int], frames: int, block: int, decay: float, device: torch.device
) -> Tensor:
    """Which blocks are kept, the same for all heads: (1, 1, blocks, blocks).

    picture: first token of the video and the one after its last, frame after frame; the others are the text's. Of a
    frame with s tokens, those of frames at a distance d see each other where their places differ by less than

        w(d) = decay * s / 2^floor(log2 max(d, 1))        (section 4.2 of the paper, its 2^.. rounded down)

    and, where that is less than a block, by less than a block at every ceil(block / w)-th distance. Frames next to each
    other and the first frame's keys are seen whole (the attention sink). A block of pairs is kept if one of its nine
    pairs of first, middle and last tokens is. Blocks with text, and those on the diagonal, are always kept. A decay of
    2^(bits of `frames`) keeps everything.
    """
    begin, end = picture
    size = (end - begin) // frames
    starts = torch.arange(0, tokens, block, device=device)
    ends = (starts + block).clamp_max(tokens) - 1
    points = torch.stack([starts, (starts + ends) // 2, ends], 1).flatten()
    frame, place = (points - begin).div(size, rounding_mode="floor"), (points - begin) % size
    distance = (frame[:, None] - frame[None]).abs()
    width = decay * size / 2.0 ** distance.clamp_min(1).double().log2().floor()
    apart = (place[:, None] - place[None]).abs()
    every = (block / width).ceil().long().clamp_min(1)  # 1 where the window is a block or more
    seen = (apart < width.clamp_min(block)) & (distance % every == 0)
    seen |= (distance <= 1) | (frame[None] == 0)
    count = len(starts)
    kept = seen.view(count, 3, count, 3).any(-1).any(1)
    text = (starts < begin) | (ends >= end)
    kept = kept | text[:, None] | text[None] | torch.eye(count, dtype=torch.bool, device=device)
    return kept[None, None]
