"""The Triton program of `kernels_triton`; apart because importing it needs Triton."""

# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def product(x, q, scale, y, M, N, K, groups, BM: tl.constexpr, BN: tl.constexpr, G: tl.constexpr):
    """y [M, N] float32 = x [M, K] times the transpose of 4-bit q [N, groups * G / 2] with scale [N, groups]."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.arange(0, G)
    total = tl.zeros((BM, BN), dtype=tl.float32)
    for group in range(groups):
        at = group * G + k
        a = tl.load(x + m[:, None] * K + at[None, :], mask=(m[:, None] < M) & (at[None, :] < K), other=0.0)
        packed = tl.load(q + n[None, :] * (groups * G // 2) + at[:, None] // 2, mask=n[None, :] < N, other=0)
        four = (packed.to(tl.int32) >> ((at[:, None] % 2) * 4)) & 15
        s = tl.load(scale + n * groups + group, mask=n < N, other=0.0).to(tl.float32)
        b = ((four.to(tl.float32) - 8.0) * s[None, :]).to(a.dtype)
        total += tl.dot(a, b)
    tl.store(y + m[:, None] * N + n[None, :], total, mask=(m[:, None] < M) & (n[None, :] < N))
