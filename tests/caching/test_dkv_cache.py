"""dkv_cache: exact at interval 1 and with editing, else fewer positions, on models whose cache may have gaps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastdiff
from fastdiff.errors import BadConfig, UnsupportedModel
from tests import language, tiny
from tests.language import MASK, make, prompt, write
from tests.state import differences, snapshot

PLAIN = {
    "editing_threshold": None,
    "num_inference_steps": 8,
    "gen_length": 61,
    "eos_early_stop": False,
    "threshold": 2.0,
}


def fast(model: str = "block-causal", **settings: Any) -> tuple[Any, fastdiff.Accelerated]:
    pipe = make(model)
    return pipe, fastdiff.accelerate(pipe, cache={"method": "dkv_cache", **settings})


@pytest.mark.parametrize("call", [{}, {"temperature": 1.0}, {"editing_threshold": 0.5}], ids=str)
@pytest.mark.parametrize("model", ["block-causal", "bidirectional", "llama"])
def test_an_interval_of_1_changes_nothing(model, call):
    pipe, handle = fast(model, interval=1)
    seeded = [PLAIN | call | {"generator": torch.Generator().manual_seed(0)} for _ in range(2)]
    assert torch.equal(write(pipe, **seeded[0]), write(make(model), **seeded[1]))
    assert handle.report.cached == 0


def test_with_editing_everything_is_computed_and_said():
    pipe, handle = fast()
    call = PLAIN | {"editing_threshold": 0.5, "threshold": 0.7}
    assert torch.equal(write(pipe, **call), write(make(), **call))
    assert handle.report.cached == 0 and "editing_threshold = None" in " ".join(handle.report.notes)


@pytest.mark.parametrize("model", ["block-causal", "bidirectional"])
@pytest.mark.parametrize("ids", [prompt(24), prompt(13, batch=2, seed=3)], ids=["one row", "two rows"])
def test_a_step_feeds_what_was_open_at_the_step_before(model, ids):
    pipe, handle = fast(model, interval=4)
    pipe.model.fed.clear()
    found = write(pipe, ids, **PLAIN)
    report = handle.report
    assert not (found == MASK).any() and report.cached > report.computed
    own = [fed // len(ids) for fed in pipe.model.fed]
    assert f"{sum(pipe.model.fed)} of " in " ".join(report.notes)
    if len(ids) == 1:  # one token a step: the first step is whole, two are tried, then the delay shows
        assert own[:3] == [32, 32, 8] and [fed for fed in own if fed < 32][:3] == [8, 7, 6]


def test_a_token_is_kept_one_step_after_it_was_decoded():
    """So that the keys that are kept are those of the token itself, not of the mask that stood there."""
    pipe, _ = fast(interval=8)
    states: list[torch.Tensor] = []
    fed: list[list[int]] = []

    def look(pipe: Any, step: int, timestep: Any, kwargs: dict) -> dict:
        states.append(kwargs["block_x"].clone())
        return kwargs

    pipe.model.layers[0].register_forward_pre_hook(lambda _, args: fed.append(args[1][0].tolist()))
    write(pipe, prompt(24), **PLAIN | {"gen_length": 8, "callback_on_step_end": look})
    whole = list(range(32))
    tried = [fed[0], *(call for call in fed[1:] if call != whole)]
    assert 2 <= fed.count(whole) <= 3, "the model is tried without a gap and with one"
    assert len(states) == len(tried) == 8
    for step in range(1, 8):
        before = states[step - 2][0] == MASK if step > 1 else torch.arange(32) >= 24
        assert tried[step] == before.nonzero().flatten().tolist()


def test_what_is_kept_stays_in_its_place():
    """Keys of the first layer depend on a token and its place alone: after a step they are those of a full forward."""
    (pipe, handle), plain = fast(interval=8), make().model
    caches: list[Any] = []
    states = [torch.cat([prompt(24), torch.full((1, 8), MASK)], 1)]

    def look(pipe: Any, step: int, timestep: Any, kwargs: dict) -> dict:
        whole = plain(states[-1], use_cache=True).past_key_values.layers[0]
        for name in ("keys", "values"):
            assert (getattr(whole, name) - getattr(caches[-1].layers[0], name)).abs().max() < 1e-4
        states.append(kwargs["block_x"].clone())
        return kwargs

    pipe.model.layers[0].register_forward_pre_hook(lambda _, args: caches.append(args[3]))
    write(pipe, prompt(24), **PLAIN | {"gen_length": 8, "callback_on_step_end": look})
    assert handle.report.cached > 3


def test_a_model_that_masks_by_the_place_in_its_cache_is_computed_in_full():
    pipe, handle = fast("llama")
    assert torch.equal(write(pipe, **PLAIN), write(make("llama"), **PLAIN))
    assert handle.report.cached == 0 and "with its own cache the model's logits are" in " ".join(handle.report.notes)


def test_without_a_cache_in_the_output_everything_is_computed(monkeypatch):
    pipe, handle = fast()
    monkeypatch.setattr(language, "DynamicCache", lambda: None)
    assert torch.equal(write(pipe, **PLAIN), write(make(), **PLAIN))
    assert handle.report.cached == 0 and "nothing to keep: the model gave NoneType" in " ".join(handle.report.notes)


def test_a_second_call_equals_a_fresh_one_and_restore_leaves_no_trace():
    pipe = make()
    write(pipe, **PLAIN)
    pipe.model.fed.clear()
    before = snapshot(pipe)
    handle = fastdiff.accelerate(pipe, cache="dkv_cache")
    write(pipe, prompt(9, batch=3), **PLAIN)
    assert torch.equal(write(pipe, **PLAIN), write(fast()[0], **PLAIN)) and handle.report.cached
    handle.restore()
    pipe.model.fed.clear()
    assert differences(before, snapshot(pipe)) == []


def test_what_it_is_not_for_is_refused():
    with pytest.raises(UnsupportedModel, match="dkv_cache is for language models"):
        fastdiff.accelerate(tiny.make("sd15"), cache="dkv_cache")
    with pytest.raises(UnsupportedModel, match="dkv_cache needs a model that keeps keys and values"):
        fastdiff.accelerate(make("forgetful"), cache="dkv_cache")
    with pytest.raises(BadConfig, match="dkv_cache predicts nothing and has no use for order"):
        fastdiff.accelerate(make(), cache={"method": "dkv_cache", "order": 3})


@pytest.mark.parametrize("model", ["block-causal", "bidirectional"])
def test_tokens_after_the_open_block_matter_to_no_block_causal_model(model):
    """Why there is no truncation of suffixes here: the pipeline never feeds one. A model that sees them is told apart
    by changing a token of the suffix."""
    lm, ids = make(model).model, prompt(40)
    changed = ids.clone()
    changed[:, 36] = (changed[:, 36] + 1) % MASK
    alike = [lm(x).logits[:, 16:24] for x in (ids, changed, ids[:, :24])]
    same = torch.equal(alike[0], alike[1])
    assert same == (model == "block-causal") and alike[0].abs().max() > 1
    assert ((alike[0] - alike[2]).abs().max() < 1e-3) == same
