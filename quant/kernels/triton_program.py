"""The Triton program of `kernels/triton.py`; apart because importing it needs Triton."""

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
