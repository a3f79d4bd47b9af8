"""What a cache holds: counted to the byte, foreseen in the first step, and refused before the memory is full."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

import fastdiff
from fastdiff.caching import holding, session
from fastdiff.errors import BadConfig, DoesNotFit
from fastdiff.studio.holding import cache_bytes
from tests import tiny


def held(name: str, cache: dict, **told) -> float:
    pipe = tiny.make(name)
    with fastdiff.accelerate(pipe, cache=cache) as handle:
        tiny.run(pipe, name, **told)
        return handle.report.cache_mb * 1e6


def test_of_the_model_output_it_is_the_output():
    """Guidance is a batch of two in sd15, float32 [2, 4, 8, 8]; two calls in wan."""
    assert held("sd15", {"method": "ab_cache", "interval": 2, "predictor": "reuse"}) == 2 * 4 * 8 * 8 * 4
    one = held("wan", {"method": "ab_cache", "interval": 2, "predictor": "reuse"})
    assert one == 2 * held("wan", {"method": "ab_cache", "interval": 2, "predictor": "reuse"}, guidance_scale=1.0)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_as_many_values_as_the_predictor_reads(order):
    cache = {"method": "ab_cache", "interval": 2, "predictor": "adams_bashforth", "order": order, "warmup_steps": 3}
    assert held("sd3", cache) == order * held("sd3", cache | {"predictor": "reuse"})


def test_a_run_of_fewer_computed_steps_is_not_thought_to_hold_more(monkeypatch):
    one = held("sd3", {"method": "fora", "interval": 3, "predictor": "reuse"})
    monkeypatch.setattr(holding, "free", lambda device: 2.5 * one)
    assert held("sd3", {"method": "taylorseer", "interval": 3, "warmup_steps": 1, "order": 4}) == 2 * one
    with pytest.raises(DoesNotFit):
        held("sd3", {"method": "taylorseer", "interval": 2, "warmup_steps": 1, "order": 4})


@pytest.mark.parametrize(("name", "share"), [("flux", 0.4), ("wan", 0.15), ("sd15", 0.2)])
def test_what_does_not_fit_is_refused_before_it_is_taken(monkeypatch, name, share):
    """Blocks of a transformer are alike, so that the first of each kind tells; of a UNet's layers each tells of its own
    values to come."""
    cache = {"method": "taylorseer", "interval": 2, "warmup_steps": 3, "order": 3}
    whole = held(name, cache)
    pipe, taken = tiny.make(name), []
    monkeypatch.setattr(holding, "free", lambda device: 0.4 * whole - sum(map(holding.bytes_of, taken)))
    before = session.Session._take

    def counting(self, number, region, memory, output):
        result = before(self, number, region, memory, output)
        taken.append(memory.taken)
        return result

    monkeypatch.setattr(session.Session, "_take", counting)
    plain = tiny.run(tiny.make(name), name)
    handle = fastdiff.accelerate(pipe, cache=cache)
    with pytest.raises(DoesNotFit, match=r"taylorseer would hold .*; cpu has .* free; .* \(ab_cache, dp\) about"):
        tiny.run(pipe, name)
    assert sum(map(holding.bytes_of, taken)) <= share * whole
    handle.restore()
    assert torch.equal(tiny.run(pipe, name), plain), "nothing is left half-installed"


def test_after_a_refusal_the_next_call_starts_afresh(monkeypatch):
    pipe = tiny.make("flux")
    handle = fastdiff.accelerate(pipe, cache={"method": "fora", "interval": 2})
    wanted = tiny.run(pipe, "flux")
    monkeypatch.setattr(holding, "free", lambda device: 0)
    with pytest.raises(DoesNotFit):
        tiny.run(pipe, "flux")
    monkeypatch.undo()
    assert torch.equal(tiny.run(pipe, "flux"), wanted)
    assert handle.report.cached == 3


def test_nothing_is_held_after_a_run():
    pipe, kept = tiny.make("sd3"), []
    handle = fastdiff.accelerate(pipe, cache={"method": "fora", "interval": 2})
    commit = session.Session.commit

    def watched(self, index):
        kept.extend(weakref.ref(leaf) for memory in self._all() for leaf in memory.taken or ())
        commit(self, index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session.Session, "commit", watched)
        tiny.run(pipe, "sd3")
    gc.collect()
    assert kept and all(reference() is None for reference in kept)
    assert handle.report.cache_mb > 0 and handle.report.to_dict()["cache_mb"] > 0


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux"])
@pytest.mark.parametrize("method", ["fora", "taylorseer"])
def test_what_a_run_will_hold_is_known_after_its_first_step(method, name):
    pipe = tiny.make(name)
    foreseen = cache_bytes(pipe, [method], 64)
    with fastdiff.accelerate(pipe, cache={"method": method, "interval": 2, "warmup_steps": 3}) as handle:
        pipe("a photo", num_inference_steps=8, height=64, width=64, output_type="latent")
    assert foreseen == {method: round(handle.report.cache_mb * 1e6)}


def test_a_method_that_needs_a_plan_has_to_be_calibrated_before():
    with pytest.raises(BadConfig, match="needs a plan"):
        cache_bytes(tiny.make("sd3"), ["dp"])
    assert cache_bytes(tiny.make("sd3"), []) == {}


def test_what_does_not_fit_is_refused_under_compile_too(monkeypatch):
    """After the step that was one graph: what the predictor will hold besides is refused."""
    pipe = tiny.make("sd3")
    cache = {"method": "taylorseer", "interval": 2, "warmup_steps": 3, "order": 3}
    handle = fastdiff.accelerate(pipe, cache=cache, compile={"enabled": True, "scope": "denoiser", "backend": "eager"})
    monkeypatch.setattr(holding, "free", lambda device: 0)
    with pytest.raises(DoesNotFit, match="taylorseer would hold"):
        tiny.run(pipe, "sd3")
    monkeypatch.undo()
    tiny.run(pipe, "sd3")
    assert handle.report.cached > 0
