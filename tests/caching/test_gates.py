"""Dynamic policies: formulas worked out by hand, when drift starts anew, and how often the host looks at the device."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers.hooks.sea_cache import _apply_sea_filter
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastdiff
from fastdiff.bench.peers import peers_for
from fastdiff.caching.base import Gated
from fastdiff.caching.methods.easycache import EasyCache
from fastdiff.caching.methods.first_block import FirstBlock
from fastdiff.caching.methods.magcache import MagCache, Ratios
from fastdiff.caching.methods.seacache import SeaCache, wiener
from fastdiff.caching.methods.teacache import TeaCache
from fastdiff.caching.region import Memory
from tests import tiny
from tests.caching.fakes import ANYWHERE, did, run_of, step_of

STEPS = 8


def numbers(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


def test_first_block_compares_with_the_last_computed_step():
    memory = Memory(probe=numbers(1.1, 2.2), probes=[numbers(9, 9), numbers(1, 2)], previous=numbers(5, 5))
    assert float(FirstBlock().change(step_of(4), memory)) == pytest.approx(0.3 / 3)


def test_teacache_sums_rescaled_changes_from_step_to_step():
    """Not from the last computed step; the highest power comes first; the drift so far is added to."""
    memory = Memory(probe=numbers(1.5, 2.5), previous=numbers(1, 2), probes=[numbers(7, 7)], drift=0.25)
    moved = 1 / 3
    assert float(TeaCache().change(step_of(4), memory)) == pytest.approx(0.25 + moved)
    rescaled = TeaCache(coefficients=(2.0, -3.0, 0.5)).change(step_of(4), memory)
    assert float(rescaled) == pytest.approx(0.25 + abs(2 * moved**2 - 3 * moved + 0.5))


def test_easycache_expects_the_output_to_move_as_it_did_for_the_input():
    memory = Memory(
        probe=numbers(2.0, 2.0), previous=numbers(1.5, 1.5), drift=0.1,
        probes=[numbers(3, 3), numbers(1, 1)], values=[[numbers(10, 10)], [numbers(4, 4)]],
    )  # fmt: skip
    rate = 6 / 2  # of change of the outputs over the inputs of the last two computed steps
    assert float(EasyCache().change(step_of(4), memory)) == pytest.approx(0.1 + rate * 0.5 / 4)
    first = Memory(probe=numbers(2, 2), previous=numbers(1.5, 1.5), probes=[numbers(1, 1)], values=[[numbers(4, 4)]])
    assert float(EasyCache().change(step_of(1), first)) == pytest.approx(0.5 / 1.5), "no rate is known yet"


def test_the_wiener_filter_passes_what_is_signal():
    """g = a P / (a^2 P + s^2), P = |f|^-3, scaled to mean 1; along one axis, by a plain sum."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 6, 2, generator=generator)  # tokens
    signal, noise = 0.6, 0.4
    frequency = torch.tensor([0, 1 / 6, 2 / 6, 3 / 6, 2 / 6, 1 / 6])
    power = 1 / (frequency**3 + 1e-16)  # the constant is signal, to the last
    gain = signal * power / (signal**2 * power + noise**2)
    spectrum = torch.fft.fft(latents, dim=1) * (gain / gain.mean())[None, :, None]
    assert torch.allclose(wiener(latents, signal, noise), torch.fft.ifft(spectrum, dim=1).real, atol=1e-6)
    maps = torch.randn(2, 3, 8, 8, generator=generator)
    assert torch.allclose(wiener(maps, 1.0, 0.0), maps, atol=1e-5), "without noise all is signal"
    smooth = wiener(maps, 0.1, 1.0)
    assert (smooth[..., 1:] - smooth[..., :-1]).norm() < (maps[..., 1:] - maps[..., :-1]).norm()
    assert wiener(torch.randn(1, 4, 3, 8, 8), 0.5, 0.5).shape == (1, 4, 3, 8, 8)


@pytest.mark.parametrize("flow", [True, False])
def test_seacache_filters_each_of_two_latents_at_its_own_noise_level(flow):
    generator = torch.Generator().manual_seed(0)
    now, before = (torch.randn(1, 4, 8, 8, generator=generator) for _ in range(2))
    step = step_of(4, flow=flow)
    levels = step.run.signal_and_noise(4), step.run.signal_and_noise(2)
    assert levels[0] == pytest.approx((0.4, 0.6) if flow else (1 / 1.36**0.5, 0.6 / 1.36**0.5))
    filtered, filtered_before = wiener(now, *levels[0]), wiener(before, *levels[1])
    expected = (filtered - filtered_before).abs().mean() / filtered_before.abs().mean()
    memory = Memory(probe=now, previous=before, at=2, drift=0.5)
    assert float(SeaCache().change(step, memory)) == pytest.approx(0.5 + float(expected), rel=1e-5)


@pytest.mark.parametrize("noise", [1.0, 0.9, 0.5, 0.1])
def test_the_wiener_filter_is_that_of_diffusers(noise):
    latents = torch.randn(1, 4, 3, 8, 16, generator=torch.Generator().manual_seed(0))
    theirs = _apply_sea_filter(latents[0].movedim(0, -1), noise, 3.0).movedim(-1, 0)
    assert torch.allclose(wiener(latents, 1 - noise, noise)[0], theirs, atol=1e-5)


@pytest.mark.parametrize("threshold", [0.3, 0.5])
def test_seacache_decides_as_the_hook_of_diffusers_does(threshold):
    """On a trained model, whose changes lie around the threshold; one other decision is a picture 0.1 away."""
    pipe, drawn = fastdiff.load("shapes-dit"), []
    call = {"num_inference_steps": 14, "guidance_scale": 3.0, "output_type": "latent"}

    def latents(draw):
        drawn.append(draw("a large red circle", generator=torch.Generator().manual_seed(3), **call)[0])

    rival = next(peer for peer in peers_for(pipe, 14) if peer.name == "SeaCache 0.5")
    with replace(rival, settings={"threshold": threshold}).installed(pipe) as running:
        latents(running.call)
        theirs = running.computed()
    with fastdiff.accelerate(pipe, cache={"method": "seacache", "threshold": threshold, "coordinate": "step"}) as own:
        latents(pipe)
    assert own.report.computed == theirs < 12
    assert torch.allclose(*drawn, atol=1e-4)


def magnitudes(*ratios: float, **settings) -> list[bool]:
    run = run_of(len(ratios))
    plan = Ratios(denoiser="x", scheduler="y", sigmas=run.sigmas, ratios=ratios)
    return MagCache(plan=plan, **settings).mask(run, ANYWHERE)


def test_magcache_adds_up_the_distance_of_products_of_ratios_from_1():
    """Skip while sum |1 - r| <= threshold, r the product since the last computed step."""
    ratios = (1.0, 0.98, 0.96, 0.95, 0.99, 0.9, 1.0, 1.02)
    expected, error, product = [], 0.0, 1.0
    for index, ratio in enumerate(ratios):
        product *= ratio
        error += abs(1 - product)
        skip = index >= 2 and error <= 0.06
        expected.append(not skip)
        if not skip:
            error, product = 0.0, 1.0
    assert False in expected and True in expected[2:]
    assert magnitudes(*ratios, threshold=0.06, retention=0.25) == expected
    assert all(magnitudes(*[1.0] * 8, threshold=0))
    assert magnitudes(*[1.0] * 8, threshold=0.1, retention=0) == [i % 4 == 0 for i in range(8)], "3 in a row at most"


def test_magcache_reads_its_ratios_at_the_noise_levels_of_another_run():
    run = run_of(8)
    plan = Ratios(denoiser="x", scheduler="y", sigmas=run.sigmas, ratios=[1, 1, 1, 1, 0.5, 0.5, 0.5, 0.5])
    method = MagCache(plan=plan, retention=0, threshold=0.1, max_consecutive_cached=99)
    assert method.mask(run, ANYWHERE) == [True, *[False] * 3, *[True] * 4]
    twice = method.mask(run_of(16), ANYWHERE)
    assert twice[0] and not any(twice[1:6]) and all(twice[8:15])


# drift and lag in a session


def with_changes(monkeypatch, changes: list[float], **settings) -> tuple[list[bool], list[float]]:
    """Which steps of a run are computed where the denoiser's own changes are these; and the drift at each look."""
    seen: list[float] = []

    def change(self, step, memory):
        seen.append(float(memory.drift))
        return memory.drift + torch.tensor(changes[step.index])

    monkeypatch.setattr(EasyCache, "change", change)
    pipe = tiny.make("pixart")
    handle = fastdiff.accelerate(
        pipe, cache={"method": "easycache", "warmup_steps": 1, "cooldown_steps": 0, "threshold": 1.0} | settings
    )
    tiny.run(pipe, "pixart", steps=STEPS)
    return did(handle), seen


def test_drift_starts_anew_at_a_computed_step(monkeypatch):
    mask, drift = with_changes(monkeypatch, [9, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4])
    assert mask == [True, False, False, True, False, False, True, False]
    assert drift == pytest.approx([0, 0.4, 0.8, 0, 0.4, 0.8, 0])


def test_drift_starts_anew_where_a_guard_computes(monkeypatch):
    mask, drift = with_changes(monkeypatch, [0.3] * STEPS, max_consecutive_cached=1)
    assert mask == [True, False] * 4
    assert drift == [0, 0, 0, 0], "no look where the guard decides"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_change_that_is_not_a_number_is_computed_and_forgotten(monkeypatch, bad):
    mask, _ = with_changes(monkeypatch, [0, 0, bad, 0, 0, 0, 0, 0])
    assert mask == [i in (0, 2) for i in range(STEPS)]


def test_a_threshold_of_0_computes_even_what_does_not_change(monkeypatch):
    mask, _ = with_changes(monkeypatch, [0.0] * STEPS, threshold=0)
    assert all(mask)


def test_lagged_decides_on_the_number_of_the_step_before(monkeypatch):
    """A jump at step 3 is known at step 4, where it is computed; the first look has nothing but its own number."""
    changes = [0, 0, 0, 5, 0, 0, 0, 0]
    assert with_changes(monkeypatch, changes)[0] == [i in (0, 3) for i in range(STEPS)]
    monkeypatch.undo()
    assert with_changes(monkeypatch, changes, lagged=True)[0] == [i in (0, 4) for i in range(STEPS)]


# looks at the device


class Looks(TorchDispatchMode):
    """Counts what makes the host wait for numbers from the device, inside the denoiser's calls."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.inside = 0, False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += self.inside and function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def looks(name: str, cache: dict | None) -> list[int]:
    """Looks of the host in each step."""
    pipe, mode, counted = tiny.make(name), Looks(), []
    handle = fastdiff.accelerate(pipe, cache=cache)
    denoiser = tiny.denoiser(pipe)

    def enter(*_):
        mode.inside, mode.count = True, 0

    def leave(*_):
        mode.inside = False
        counted.append(mode.count)

    def listed(tensor: Tensor) -> Any:  # which no mode of torch sees
        mode.count += mode.inside
        return own(tensor)

    own = Tensor.tolist
    denoiser.register_forward_pre_hook(enter)
    denoiser.register_forward_hook(leave)
    with mode, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "tolist", listed)
        tiny.run(pipe, name, steps=STEPS)
    handle.restore()
    return counted


STATIC = {
    "static": {"compute_steps": [0, 2, 4], "of_steps": STEPS},
    "ab_cache": {"interval": 3, "warmup_steps": 1},
    "taylorseer": {"interval": 3, "warmup_steps": 1, "lebesgue_max": 1},  # reuse: nothing is amplified
    "fora": {"interval": 3},
    "pab": {"between": (0, 1)},
    "tgate": {},
    "joint": {"kinds": ["full", *["partial"] * (STEPS - 1)], "predictor": "reuse"},
    "a_sdm": {"interval": 3},
    "faster_diffusion": {"interval": 3, "max_parallel": 1},
}


@pytest.mark.parametrize("method", STATIC)
def test_a_static_method_never_waits_for_the_device(method):
    """Where nothing is amplified: the bound of an extrapolation is a number that comes from the device, long before."""
    settings = {"predictor": "reuse"} if method in ("ab_cache", "taylorseer") else {}
    plain = looks("pixart", None)
    own = looks("pixart", {"method": method, **STATIC[method], **settings})
    assert own == plain[: len(own)]


@pytest.mark.parametrize("method", ["first_block", "dbcache", "dicache", "teacache", "easycache", "seacache"])
def test_a_dynamic_method_looks_once_where_no_guard_decides(method):
    guards = {"warmup_steps": 3, "cooldown_steps": 2, "threshold": 1e9, "predictor": "reuse"}
    guards |= {"slope": False} if method == "dicache" else {}
    plain = looks("pixart", None)
    own = looks("pixart", {"method": method, "max_consecutive_cached": 2, **guards})
    assert [mine - theirs for mine, theirs in zip(own, plain, strict=True)] == [0, 0, 0, 1, 1, 0, 0, 0]


def test_all_gated_methods_are_here():
    found = {sub for cls in (Gated, *Gated.__subclasses__()) for sub in cls.__subclasses__()}
    names = {cls.model_fields["method"].default for cls in found if cls.__module__.startswith("fastdiff.")}
    assert names == {"first_block", "dbcache", "dicache", "teacache", "easycache", "seacache"}
