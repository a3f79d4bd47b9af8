"""DistriFusion: Distributed Parallel Inference for High-Resolution Diffusion Models. https://arxiv.org/abs/2402.19481."""

from __future__ import annotations

from typing import Literal

from fastdiff.parallel.displaced import Displaced


class DistriFusion(Displaced):
    """Displaced patch parallelism: after the warm-up, layers use the other ranks' values of the step before.

    Neighbouring steps are alike, so old keys, values and halos are nearly right, and every transfer has a whole step to
    hide in. Group normalization corrects the old global statistics by the change of its own (paper, section 4.2). The
    warm-up counts the first step in: the authors' `warmup_steps = 4` are 5 synchronous steps, as here.

    Formula: y_r = f(x_r; own z_i, the others' z_(i-1)) for the rows x_r of rank r; z are keys and values and borders.
    Moments for group normalization are m_(i-1) of the whole picture + own m_i - own m_(i-1).
    """

    method: Literal["distrifusion"] = "distrifusion"
