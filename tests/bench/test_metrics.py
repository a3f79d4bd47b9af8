"""Metrics on images whose distance is known."""

import json

import numpy as np
import pytest

from fastdiff.bench.metrics import PSNR_CAP, psnr, ssim
from fastdiff.bench.render import frontier


def _noise(seed, count=2):
    return np.random.default_rng(seed).random((count, 24, 24, 3), np.float32)


def test_psnr_of_a_constant_error_is_the_textbook_value():
    dark = np.zeros((3, 16, 16, 3), np.float32)
    errors = np.array([0.1, 0.01, 1.0], np.float32)
    assert psnr(dark + errors[:, None, None, None], dark) == pytest.approx([20, 40, 0], abs=1e-4)


def test_psnr_is_one_number_an_image_and_the_mean_is_of_decibels():
    image = _noise(0)
    other = _noise(1)
    expected = [-10 * np.log10(np.mean((a - b) ** 2, dtype=np.float64)) for a, b in zip(image, other, strict=True)]
    assert psnr(image, other) == pytest.approx(expected, rel=1e-5)


def test_identical_images_are_capped_so_that_json_stays_valid():
    image = _noise(0)
    assert psnr(image, image).tolist() == [PSNR_CAP, PSNR_CAP]
    json.dumps(psnr(image, image).tolist(), allow_nan=False)


def test_ssim_is_one_for_identical_images_and_known_for_constant_ones():
    image = _noise(0)
    assert ssim(image, image) == pytest.approx([1, 1], abs=1e-6)
    a, b = np.full((1, 24, 24, 3), 0.25, np.float32), np.full((1, 24, 24, 3), 0.75, np.float32)
    luminance = (2 * 0.25 * 0.75 + 0.01**2) / (0.25**2 + 0.75**2 + 0.01**2)  # no variance: only this factor is left
    assert ssim(a, b) == pytest.approx([luminance], abs=1e-5)


def test_ssim_orders_small_and_large_errors():
    image = _noise(0, 1)
    near, far = image + 0.02 * (_noise(1, 1) - 0.5), image + 0.5 * (_noise(1, 1) - 0.5)
    assert 1 > ssim(near, image)[0] > ssim(far, image)[0]


def test_frontier_keeps_what_nothing_beats():
    points = [(1.0, 50.0), (2.0, 40.0), (1.9, 30.0), (3.0, 20.0), (3.0, 25.0), (2.0, 40.0)]
    kept = [points[i] for i in frontier(points)]
    assert kept == [(1.0, 50.0), (2.0, 40.0), (3.0, 25.0)]
