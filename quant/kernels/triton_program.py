"""The Triton programs of `kernels/triton.py` and `kernels/fused.py`; apart because importing them needs Triton."""

# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def product(
    x, q, fine, y, M, N, K, groups, WHOLE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, G: tl.constexpr
):  # fmt: skip
    """y [M, N] = x [M, K] times the transpose of 4-bit weights q [N, groups * G / 2], two a byte, the low half first.

    WHOLE: int32 y of int8 x and (q - zero) * step, with fine uint8 [N, groups] = zero + 16 step. Else: float32 y of
    float x and (q - 8) * scale, with fine [N, groups] = scale.
    """
    m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)  # offsets pass 2^31 in long videos
    n = tl.program_id(1).to(tl.int64) * BN + tl.arange(0, BN)
    total = tl.zeros((BM, BN), dtype=y.dtype.element_ty)
    for group in range(groups):
        at = group * G + tl.arange(0, G)
        a = tl.load(x + m[:, None] * K + at[None, :], mask=(m[:, None] < M) & (at[None, :] < K), other=0)
        packed = tl.load(q + n[None, :] * (groups * G // 2) + at[:, None] // 2, mask=n[None, :] < N, other=0)
        four = (packed.to(tl.int32) >> ((at[:, None] % 2) * 4)) & 15
        own = tl.load(fine + n * groups + group, mask=n < N, other=0)[None, :]
        if WHOLE:
            b = (four - (own.to(tl.int32) & 15)) * (own.to(tl.int32) >> 4)
        else:
            b = (four.to(tl.float32) - 8.0) * own.to(tl.float32)
        total += tl.dot(a, b.to(a.dtype))
    tl.store(y + m[:, None] * N + n[None, :], total, mask=(m[:, None] < M) & (n[None, :] < N))


@triton.jit
def number(value, KIND: tl.constexpr):
    """A number [1] that is given as such, or lies on the device."""
    return tl.full((1,), value if KIND == 0 else tl.load(value).to(tl.float32), tl.float32)


@triton.jit
def levels(
    x, inverse, scale, zero, q, scales, K, most, ROWS: tl.constexpr, SMOOTH: tl.constexpr, KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """q [M, K] of rows x [M, K], times inverse [K] where they are smoothed; a program for each row.

    ROWS: with a scale of its own, its largest magnitude over `most`, for scales [M]: int8 or, as q is, E4M3. Else int8
    levels of a scale and a zero for all: round(x / scale) + zero within 0 .. 255, less 128.
    """
    row = tl.program_id(0).to(tl.int64)
    if ROWS:
        peak, broken = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.int32)
        for begin in range(0, K, BLOCK):
            at = begin + tl.arange(0, BLOCK)
            value = tl.load(x + row * K + at, mask=at < K, other=0).to(tl.float32)
            if SMOOTH:
                value *= tl.load(inverse + at, mask=at < K, other=0)
            peak = tl.maximum(peak, tl.abs(value))
            broken |= (value != value).to(tl.int32)
        own = tl.maximum(tl.max(peak, 0) / most, 1e-12)
        own = tl.where(tl.max(broken, 0) > 0, float("nan"), own)  # a maximum leaves out what is not a number
        tl.store(scales + row, own)
        shift = 128.0
    else:
        own, shift = number(scale, KIND), number(zero, KIND)
    for begin in range(0, K, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        value = tl.load(x + row * K + at, mask=at < K, other=0).to(tl.float32)
        if SMOOTH:
            value *= tl.load(inverse + at, mask=at < K, other=0)
        if q.dtype.element_ty == tl.int8:
            level = tl.minimum(tl.maximum(value * (1.0 / own) + (shift + 0.5), 0.0), 255.0)
            tl.store(q + row * K + at, (tl.floor(level) - 128.0).to(tl.int8), mask=at < K)
        else:
            tl.store(q + row * K + at, (value / own).to(q.dtype.element_ty), mask=at < K)


@triton.jit
def finish(
    product, scale, zero, scales, sums, bias, y, N, ROWS: tl.constexpr, KIND: tl.constexpr, BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """y [M, N] = (int32 product - zero * sums [N]) * scales [N] * scale + bias [N], in the type of y.

    ROWS: scale [M], and no zero; else both are numbers, or lie on the device (KIND 1).
    """
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(product + row * N + at, mask=at < N, other=0)
    if ROWS:
        own = tl.load(scale + row)
    else:
        own = number(scale, KIND)
        total -= number(zero, KIND).to(tl.int32) * tl.load(sums + at, mask=at < N, other=0)
    value = total.to(tl.float32) * (tl.load(scales + at, mask=at < N, other=0) * own)
    if BIAS:
        value += tl.load(bias + at, mask=at < N, other=0)
    tl.store(y + row * N + at, value.to(y.dtype.element_ty), mask=at < N)


@triton.jit
def patches(
    q, zero, out, H, W, C, OH, OW, K, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out [b OH OW, K]: what each output pixel sees of int8 pictures q [b, H, W, C], in the order of a convolution's
    weight [C, KH, KW], and `zero` beyond their edges. Taps of a channel lie far apart, but in a cache's reach."""
    row, k = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    picture, pixel = row // (OH * OW), row % (OH * OW)
    channel, tap = k // (KH * KW), k % (KH * KW)
    y = pixel // OW * SH - PH + tap // KW * DH
    x = pixel % OW * SW - PW + tap % KW * DW
    inside = (k < K) & (y >= 0) & (y < H) & (x >= 0) & (x < W)
    seen = tl.load(q + ((picture * H + y) * W + x) * C + channel, mask=inside, other=0)
    seen = tl.where(inside, seen, number(zero, KIND).to(tl.int8))
    tl.store(out + row * K + k, seen, mask=k < K)
