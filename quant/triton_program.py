"""The Triton programs of `kernels_triton`; apart because importing them needs Triton."""

# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def floats(x, q, scale, y, M, N, K, groups, BM: tl.constexpr, BN: tl.constexpr, G: tl.constexpr):
    """y [M, N] float32 = x [M, K] times the transpose of 4-bit q [N, groups * G / 2] with scale [N, groups]."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    total = tl.zeros((BM, BN), dtype=tl.float32)
    for group in range(groups):
        at = group * G + tl.arange(0, G)
        a = tl.load(x + m[:, None] * K + at[None, :], mask=(m[:, None] < M) & (at[None, :] < K), other=0.0)
        s = tl.load(scale + n * groups + group, mask=n < N, other=0.0).to(tl.float32)
        b = ((nibbles(q, n, at, N, groups * G).to(tl.float32) - 8.0) * s[None, :]).to(a.dtype)
        total += tl.dot(a, b)
    tl.store(y + m[:, None] * N + n[None, :], total, mask=(m[:, None] < M) & (n[None, :] < N))


@triton.jit
def integers(x, q, fine, y, M, N, K, groups, BM: tl.constexpr, BN: tl.constexpr, G: tl.constexpr):
    """y [M, N] int32 = int8 x [M, K] times the transpose of (q - zero) * step; fine [N, groups] is zero + 16 step."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    total = tl.zeros((BM, BN), dtype=tl.int32)
    for group in range(groups):
        at = group * G + tl.arange(0, G)
        a = tl.load(x + m[:, None] * K + at[None, :], mask=(m[:, None] < M) & (at[None, :] < K), other=0)
        both = tl.load(fine + n * groups + group, mask=n < N, other=0).to(tl.int32)
        b = (nibbles(q, n, at, N, groups * G) - (both & 15)[None, :]) * (both >> 4)[None, :]
        total += tl.dot(a, b.to(tl.int8))
    tl.store(y + m[:, None] * N + n[None, :], total, mask=(m[:, None] < M) & (n[None, :] < N))


@triton.jit
def nibbles(q, n, at, N, row):
    """Columns `at` of rows n of q as int32 [G, BN]; two share a byte, the first in the low half."""
    packed = tl.load(q + n[None, :] * (row // 2) + at[:, None] // 2, mask=n[None, :] < N, other=0)
    return (packed.to(tl.int32) >> ((at[:, None] % 2) * 4)) & 15
