"""Predictors and guards through real pipelines: exact where they should be, of lower order where they must, finite."""

from __future__ import annotations

from itertools import product

import pytest
import torch

import fastdiff
from fastdiff.caching.predictors import PREDICTORS
from fastdiff.errors import BadConfig
from fastdiff.registry import registry
from tests import tiny
from tests.caching.fakes import answering, did, draw, outputs_of
from tests.some import some

STEPS = 10
FAR = 1e9


def predicted(cache: dict, answer, steps: int = STEPS):
    """What the denoiser gave at each step, its timesteps, and the handle, for a made-up denoiser."""
    pipe, times = answering(answer), []
    handle = fastdiff.accelerate(pipe, cache=cache)
    handle.clock.on_start.append(lambda run: times.extend(run.timesteps))
    outputs = outputs_of(pipe, lambda pipe: draw(pipe, steps))
    return [float(output.flatten()[0]) for output in outputs], times, handle


@pytest.mark.parametrize("predictor", ["adams_bashforth", "taylor"])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("coordinate", ["step", "timestep", "sigma", "logsnr"])
def test_a_polynomial_of_the_coordinate_is_reproduced_on_uneven_keys(predictor, order, coordinate):
    """Others take plain differences for derivatives, which is wrong from the second order on, and off an even grid."""
    cache = {
        "method": "static", "compute_steps": [0, 1, 2, 3, 6], "of_steps": STEPS, "predictor": predictor, "order": order,
        "coordinate": coordinate, "lebesgue_max": FAR,
    }  # fmt: skip
    places: dict[float, float] = {}

    def polynomial(timestep: float) -> float:
        x = places.get(timestep, 0.0)
        return 0.3 + sum((-1) ** k * x**k for k in range(1, order))

    pipe = answering(polynomial)
    handle = fastdiff.accelerate(pipe, cache=cache)

    def learn(run) -> None:
        axis = run.coordinates(coordinate)
        scale = max(map(abs, axis))
        places.update(zip(run.timesteps, (x / scale for x in axis), strict=True))

    handle.clock.on_start.append(learn)
    outputs = outputs_of(pipe, lambda pipe: draw(pipe, STEPS))
    times = list(places)
    assert did(handle) == [i in (0, 1, 2, 3, 6) for i in range(STEPS)]
    for index in (4, 5, 7, 8, 9):
        assert float(outputs[index].flatten()[0]) == pytest.approx(polynomial(times[index]), abs=1e-6, rel=1e-6)


def test_taylorseer_forecasts_a_square_from_keys_at_0_1_2_and_6():
    """The authors' code, diffusers' and cache-dit's forecast 65.6 for 9 squared."""
    times: list[float] = []
    cache = {"method": "taylorseer", "lite": True, "interval": 4, "warmup_steps": 3, "order": 3, "lebesgue_max": FAR}
    pipe = answering(lambda timestep: float(times.index(timestep)) ** 2)
    handle = fastdiff.accelerate(pipe, cache=cache)
    handle.clock.on_start.append(lambda run: times.extend(run.timesteps))
    outputs = outputs_of(pipe, lambda pipe: draw(pipe, STEPS))
    assert [i for i, computed in enumerate(did(handle)) if computed] == [0, 1, 2, 6]
    assert [float(output.flatten()[0]) for output in outputs] == pytest.approx([i**2 for i in range(STEPS)], rel=1e-6)


def test_the_order_drops_where_the_history_is_short():
    cache = {
        "method": "static", "compute_steps": [0, 3], "of_steps": STEPS, "order": 3, "predictor": "adams_bashforth",
        "lebesgue_max": FAR,
    }  # fmt: skip
    outputs, times, _ = predicted(cache, lambda timestep: timestep / 1000)
    assert outputs[1] == outputs[2] == pytest.approx(times[0] / 1000), "one value: reuse"
    assert outputs[4:] == pytest.approx([t / 1000 for t in times[4:]], rel=1e-6), "two values: a line"


def test_the_order_drops_where_errors_would_be_amplified_too_much():
    """From values at 0 and 1, step k has weights 1 - k and k, that is 2k - 1 in all."""
    cache = {
        "method": "static", "compute_steps": [0, 1], "of_steps": STEPS, "predictor": "adams_bashforth",
        "coordinate": "step", "lebesgue_max": 6,
    }  # fmt: skip
    outputs, times, _ = predicted(cache, lambda timestep: timestep / 1000)
    first, second = times[0] / 1000, times[1] / 1000
    line = [first + (second - first) * k for k in range(4)]
    assert outputs == pytest.approx([*line, *[second] * 6], rel=1e-6)


def test_halfway_is_between_reuse_and_the_polynomial():
    results = []
    for predictor in ("reuse", "halfway", "adams_bashforth"):
        cache = {
            "method": "static", "compute_steps": [0, 1], "of_steps": STEPS, "predictor": predictor, "lebesgue_max": FAR
        }  # fmt: skip
        results.append(predicted(cache, lambda timestep: timestep / 1000)[0])
    reuse, halfway, line = map(torch.tensor, results)
    assert torch.allclose(halfway, (reuse + line) / 2) and not torch.allclose(reuse, line)


def test_damping_is_a_share_of_the_change_in_a_run():
    reuse, part, line = (
        torch.tensor(predicted({"method": "static", "compute_steps": [0, 1], "of_steps": STEPS, "lebesgue_max": FAR,
                                "predictor": "adams_bashforth", "damping": share}, lambda t: t / 1000)[0])
        for share in (0.0, 0.3, 1.0)
    )  # fmt: skip
    assert torch.allclose(part, 0.7 * reuse + 0.3 * line) and len(set(reuse[1:].tolist())) == 1


def test_spectrum_follows_a_line_through_more_values_than_two_in_a_run():
    cache = {
        "method": "static", "compute_steps": [0, 1, 3, 6], "of_steps": STEPS, "predictor": "spectrum", "order": 4,
        "lebesgue_max": FAR,
    }  # fmt: skip
    outputs, times, _ = predicted(cache, lambda timestep: timestep / 1000)
    assert outputs[2:] == pytest.approx([t / 1000 for t in times[2:]], rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"predictor": "spectrum"}, "order = 2: spectrum goes by 3 to 6 computed values; set order to one of them"),
        ({"predictor": "adams_bashforth", "damping": 1.5}, "damping"),
        ({"method": "dp", "predictor": "reuse", "fit_damping": True}, "fit_damping = true: reuse forecasts no change"),
        ({"method": "dp", "objective": "worst"}, "objective"),
    ],
)
def test_settings_that_mean_nothing_are_refused_with_what_to_do(settings, said):
    with pytest.raises(BadConfig, match=said) as told:
        fastdiff.Config(cache={"method": "ab_cache", **settings})
    assert "\n" not in str(told.value)


ON_PIXART = {
    "static": {"compute_steps": [0], "of_steps": 12},
    "ab_cache": {"interval": 6},
    "first_block": {"threshold": FAR},
    "dbcache": {"threshold": FAR, "live_blocks": 1},
    "dicache": {"threshold": FAR, "slope": False},
    "teacache": {"threshold": FAR},
    "easycache": {"threshold": FAR},
    "seacache": {"threshold": FAR},
    "taylorseer": {"interval": 6},
    "fora": {"interval": 6},
    "pab": {"self_interval": 6, "cross_interval": 6, "between": (0, 1)},
    "faster_diffusion": {"interval": 6},
    "a_sdm": {"interval": 6},
    "tgate": {"gate": 0.1},
    "joint": {"kinds": ["full"] + ["partial"] * 11},
}
GUARDS = {
    "warmup_steps": ({"warmup_steps": 5}, lambda mask: all(mask[:5])),
    "cooldown_steps": ({"cooldown_steps": 4}, lambda mask: all(mask[-4:])),
    "max_consecutive_cached": (
        {"max_consecutive_cached": 2, "cooldown_steps": 0},
        lambda mask: not any(mask[i : i + 3] == [False] * 3 for i in range(12)) and False in mask,
    ),
    "max_cached_steps": ({"max_cached_steps": 3}, lambda mask: mask.count(False) == 3),
    "none": ({"max_cached_steps": 0}, all),
}
KNOWN_BEFORE = {"dp", "cachequant", "magcache", "deepcache", "switch"}  # they need a plan, a UNet, a second denoiser


def test_every_method_is_guarded_here():
    pictures = {name for name, method in registry("cache").items() if not method.language}
    assert pictures == ON_PIXART.keys() | KNOWN_BEFORE


@pytest.mark.parametrize(("method", "guard"), product(ON_PIXART, GUARDS))
def test_guards_hold_for_every_policy(method, guard):
    settings, holds = GUARDS[guard]
    pipe = tiny.make("pixart")
    handle = fastdiff.accelerate(pipe, cache={"method": method, **ON_PIXART[method], **settings})
    tiny.run(pipe, "pixart", steps=12)
    mask = did(handle)
    assert len(mask) == 12 and mask[0] and holds(mask), mask
    assert ("skipped nothing" in str(handle.report)) == all(mask)


@pytest.mark.parametrize(("method", "predictor"), some(product(ON_PIXART, PREDICTORS), 3))
def test_any_predictor_may_be_put_into_any_method(method, predictor):
    pipe = tiny.make("pixart")
    chosen = {"predictor": predictor, "warmup_steps": 3, "max_consecutive_cached": 1, "cooldown_steps": 0}
    chosen |= {"order": 4} if predictor == "spectrum" else {}
    handle = fastdiff.accelerate(pipe, cache={"method": method, **ON_PIXART[method], **chosen})
    cached = tiny.run(pipe, "pixart", steps=12)
    plain = tiny.run(tiny.make("pixart"), "pixart", steps=12)
    assert handle.report.cached > 0 and handle.report.notes == []
    if method != "tgate":  # that drops guidance
        assert float((cached - plain).norm() / plain.norm()) < 0.2


@pytest.mark.parametrize("method", ON_PIXART)
def test_fewer_steps_than_guards_is_plain_and_said(method):
    pipe = tiny.make("pixart")
    plain = tiny.run(pipe, "pixart", steps=4)
    guards = {"warmup_steps": 3, "cooldown_steps": 2}
    given = {"of_steps": 4} if method == "static" else {}
    handle = fastdiff.accelerate(pipe, cache={"method": method, **ON_PIXART[method], **guards, **given})
    assert torch.equal(tiny.run(pipe, "pixart", steps=4), plain)
    assert handle.report.cached == 0
    assert f"{method} skipped nothing in 4 steps with these settings" in handle.report.notes


# numbers that a dtype cannot hold


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("ahead", [False, True])
def test_a_prediction_that_would_overflow_is_computed_and_said(dtype, ahead):
    """Values within the dtype, whose straight line is not; a cached inf spoils the whole picture."""
    top = torch.finfo(dtype).max
    pipe = tiny.make("sd15")
    given: list[torch.Tensor] = []

    def forward(sample, timestep, encoder_hidden_states=None, return_dict=True, **_):
        value = top * [0.1, 0.6, 0.2, 0.2, 0.2][len(given)]
        return (torch.full_like(sample, value, dtype=dtype),)

    pipe.unet.forward = forward
    cache = {
        "method": "static", "compute_steps": [0, 1], "of_steps": 5, "predictor": "adams_bashforth",
        "coordinate": "step",
    }  # fmt: skip
    handle = fastdiff.accelerate(pipe, cache=cache)
    if ahead:
        for session in {callback.__self__ for callback in handle.clock.on_start if hasattr(callback.__self__, "ahead")}:
            session.ahead = True
    pipe.unet.register_forward_hook(lambda _m, _a, output: given.append(output[0].clone()))
    pipe.scheduler.set_timesteps(5)
    for t in pipe.scheduler.timesteps:
        pipe.unet(torch.ones(1, 4, 8, 8), t, torch.ones(1, 4, 32))
        pipe.scheduler.step(torch.zeros(1, 4, 8, 8), t, torch.zeros(1, 4, 8, 8))
    assert all(torch.isfinite(output).all() for output in given)
    assert did(handle) == [True, True, True, True, False], "the last is made of the two before it, which are small"
    said = "step {} was computed: its prediction would not have been finite"
    assert handle.report.notes == [said.format(2), said.format(3)]


def test_values_that_are_not_numbers_are_not_extrapolated():
    pipe = answering(lambda timestep: float("nan"))
    handle = fastdiff.accelerate(pipe, cache={"method": "ab_cache", "interval": 2})
    tiny.run(pipe, "sd15", steps=8)
    assert all(did(handle)[:3]) and any("would not have been finite" in note for note in handle.report.notes)
