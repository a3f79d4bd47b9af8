"""How far two images are apart. No metric here needs weights."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import torch
from numpy.typing import NDArray

from fastdiff.errors import BackendUnavailable

PSNR_CAP = 120.0  # of identical images, whose true value is infinite and not valid JSON


def psnr(images: NDArray, references: NDArray) -> NDArray:
    """Peak signal-to-noise ratio of each image in dB; arrays of (count, height, width, channels) in [0, 1]."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    found = peak_signal_noise_ratio(
        _channels_first(images), _channels_first(references), data_range=1.0, reduction="none", dim=(1, 2, 3)
    )
    return np.minimum(found.numpy(), PSNR_CAP)


def ssim(images: NDArray, references: NDArray) -> NDArray:
    """Structural similarity of each image, 1 for identical ones; arrays as for `psnr`."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    found = []
    for image, reference in zip(images, references, strict=True):  # the windows of a whole set would not fit in memory
        a, b = _channels_first(image[None]), _channels_first(reference[None])
        found.append(float(torch.as_tensor(structural_similarity_index_measure(a, b, data_range=1.0))))
    return np.array(found)


def _channels_first(images: NDArray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(images, np.float64)).permute(0, 3, 1, 2)


def require_extra() -> None:
    """Raises BackendUnavailable where the extra `bench` is not installed."""
    missing = [name for name in ("torchmetrics", "matplotlib") if find_spec(name) is None]
    if missing:
        raise BackendUnavailable(f"bench needs {' and '.join(missing)}: pip install 'fastdiff[bench]'")
