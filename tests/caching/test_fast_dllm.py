"""fast_dllm on `LLaDA2Pipeline`: the same tokens from less work, and an honest report where they are not."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from diffusers import LLaDA2Pipeline

import fastdiff
from fastdiff.caching.methods.fast_dllm import FastDLLM
from fastdiff.caching.prefix import Verdict
from fastdiff.errors import BadConfig, UnsupportedModel
from tests import language, tiny
from tests.language import EOS, MASK, make, prompt, write
from tests.some import some
from tests.state import differences, snapshot

EXACT, APPROXIMATE, OPEN = "prefix cache exact", "prefix cache approximate", "not verified"

CALLS: dict[str, dict[str, Any]] = {
    "standard": {},
    "no editing": {"editing_threshold": None},
    "no early stop": {"eos_early_stop": False, "gen_length": 61},
    "many confident tokens": {"threshold": 0.3, "gen_length": 61},
    "few confident tokens": {"threshold": 0.99, "num_inference_steps": 8, "gen_length": 61},
    "longer blocks": {"block_length": 16, "gen_length": 61},
    "sampling": {"temperature": 1.0, "gen_length": 61, "eos_early_stop": False},
}
PROMPTS = {
    "inside a block": prompt(19),
    "at the end of a block": prompt(24, seed=1),
    "shorter than a block": prompt(3, seed=2),
    "two": prompt(13, batch=2, seed=3),
}


def fast(model: str = "block-causal", **settings: Any) -> tuple[LLaDA2Pipeline, fastdiff.Accelerated]:
    pipe = make(model)
    return pipe, fastdiff.accelerate(pipe, cache={"method": "fast_dllm", **settings})


def said(handle: fastdiff.Accelerated) -> str:
    return " ".join(handle.report.notes)


def seeded(pipe: LLaDA2Pipeline, ids: torch.Tensor | None = None, **call: Any) -> torch.Tensor:
    return write(pipe, ids, generator=torch.Generator().manual_seed(0), **call)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("ids", some(PROMPTS, 2))
@pytest.mark.parametrize("model", ["block-causal", pytest.param("llama", marks=pytest.mark.slow)])
def test_the_tokens_are_those_of_the_plain_pipeline(model, ids, call):
    plain = seeded(make(model), PROMPTS[ids], **CALLS[call])
    pipe, handle = fast(model)
    assert torch.equal(seeded(pipe, PROMPTS[ids], **CALLS[call]), plain)
    assert handle.report.steps and APPROXIMATE not in said(handle)
    again = seeded(pipe, PROMPTS[ids], **CALLS[call])  # what was verified is now relied upon
    assert torch.equal(again, plain)


def test_padded_prompts_give_the_tokens_of_the_plain_pipeline():
    mask = torch.ones(2, 19, dtype=torch.long)
    mask[0, :5] = 0
    call = {"attention_mask": mask, "gen_length": 40, "eos_early_stop": False}
    pipe, handle = fast()
    assert torch.equal(write(pipe, prompt(19, 2), **call), write(make(), prompt(19, 2), **call))
    assert EXACT in said(handle)


def test_a_second_call_with_other_arguments_equals_a_fresh_one():
    pipe, handle = fast()
    for ids, call in [
        (prompt(19), {}),
        (prompt(19, seed=5), {}),
        (prompt(40, batch=3, seed=6), {"block_length": 16}),
        (prompt(2), {"gen_length": 50, "eos_early_stop": False}),
    ]:
        assert torch.equal(write(pipe, ids, **call), write(make(), ids, **call))
        assert handle.report.steps == handle.report.computed + handle.report.cached > 0


def test_a_step_is_one_call_of_the_model_and_the_positions_are_counted():
    plain, (pipe, handle) = make(), fast(verify=False)
    call = {"eos_early_stop": False, "gen_length": 61}
    write(plain, **call)
    write(pipe, **call)
    report, blocks = handle.report, (19 + 61) // 8 - 19 // 8
    assert report.steps == len(plain.model.fed) == len(pipe.model.fed)
    assert report.computed == blocks == sum(fed > 8 for fed in pipe.model.fed)
    assert f"{sum(pipe.model.fed)} of {sum(plain.model.fed)} token positions computed" in report.notes
    assert sum(pipe.model.fed) < 0.4 * sum(plain.model.fed) and OPEN in said(handle)


def test_where_the_cache_is_exact_the_prompt_is_computed_once_a_call():
    pipe, handle = fast()
    call = {"eos_early_stop": False, "gen_length": 61}
    write(pipe, **call)
    assert EXACT in said(handle) and handle.report.computed == 4  # the first call, and three comparisons
    pipe.model.fed.clear()
    write(pipe, **call)
    assert handle.report.computed == 1 and pipe.model.fed[0] == 24 and max(pipe.model.fed[1:]) == 16
    assert EXACT in said(handle)


def test_a_bidirectional_model_is_found_out_and_refreshed_at_every_block():
    pipe, handle = fast("bidirectional")
    call = {"eos_early_stop": False, "gen_length": 61, "editing_threshold": None}
    write(pipe, **call)
    assert APPROXIMATE in said(handle) and EXACT not in said(handle) and handle.report.cached
    write(pipe, **call)
    assert handle.report.computed == 8 == (19 + 61) // 8 - 19 // 8


@pytest.mark.parametrize("ids", [prompt(9), prompt(12), prompt(17), prompt(20)])
def test_a_model_with_longer_blocks_than_the_pipeline_is_found_out(ids):
    pipe, handle = fast()
    write(pipe, ids, block_length=4, eos_early_stop=False)
    assert APPROXIMATE in said(handle)


def test_a_model_with_shorter_blocks_is_exact():
    pipe, handle = fast()
    call = {"block_length": 16, "gen_length": 61, "eos_early_stop": False}
    assert torch.equal(write(pipe, **call), write(make(), **call)) and EXACT in said(handle)


def test_a_model_that_cannot_use_its_own_cache_is_computed_in_full():
    pipe, handle = fast()
    layer = pipe.model.layers[0]
    honest = layer.forward

    def deaf(x: torch.Tensor, positions: Any, allowed: Any, cache: Any) -> torch.Tensor:
        return honest(x, positions, allowed & (allowed.shape[2] == allowed.shape[3]), cache)

    layer.forward = deaf
    plain = write(make(), eos_early_stop=False)
    for _ in range(2):
        assert torch.equal(write(pipe, eos_early_stop=False), plain)
        assert handle.report.cached == 0 and "everything computed" in said(handle)


def test_without_a_cache_in_the_output_everything_is_computed(monkeypatch):
    pipe, handle = fast()
    monkeypatch.setattr(language, "DynamicCache", lambda: None)
    assert torch.equal(write(pipe), write(make()))
    assert handle.report.cached == 0 and "no prefix to keep: the model gave NoneType" in said(handle)


def test_an_exception_in_the_middle_leaves_nothing_for_the_next_call():
    def fail(pipe: Any, step: int, timestep: Any, kwargs: dict) -> dict:
        if step == 9:
            raise KeyboardInterrupt
        return kwargs

    pipe, handle = fast()
    with pytest.raises(KeyboardInterrupt):
        write(pipe, prompt(19, seed=4), callback_on_step_end=fail, eos_early_stop=False)
    assert torch.equal(write(pipe), write(make())) and handle.report.cached
    inner = pipe.model.layers[1]
    hook = inner.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write(pipe, prompt(19, seed=4))
    hook.remove()
    assert torch.equal(write(pipe), write(make())) and handle.report.cached


def test_tokens_that_a_callback_changes_are_computed_anew():
    def change(pipe: Any, step: int, timestep: Any, kwargs: dict) -> dict:
        kwargs["block_x"][:, 2] = step % MASK
        return kwargs

    call = {"callback_on_step_end": change, "eos_early_stop": False}
    pipe, _ = fast()
    assert torch.equal(write(pipe, **call), write(make(), **call))


def test_a_call_of_the_model_outside_a_run_is_the_plain_call():
    pipe, handle = fast()
    write(pipe)
    report = str(handle.report)
    ids = prompt(24)
    assert torch.equal(pipe.model(ids).logits, make().model(ids).logits) and str(handle.report) == report


@pytest.mark.parametrize("stop", [True, False])
def test_no_keys_and_values_outlive_the_call(stop):
    pipe, handle = fast()
    caches: list[Any] = []
    layer = pipe.model.layers[0]
    layer.register_forward_hook(lambda _, args, output: caches.append(weakref.ref(args[3])))
    write(pipe, eos_early_stop=stop, eos_token_id=int(write(make())[0, 4]) if stop else EOS)
    assert handle.clock.run is None and caches and not any(cache() for cache in caches)


def test_restore_leaves_no_trace():
    pipe = make()
    plain = write(pipe)
    pipe.model.fed.clear()
    before = snapshot(pipe)
    handle = fastdiff.accelerate(pipe, cache="fast_dllm")
    assert torch.equal(write(pipe), plain)
    handle.restore()
    pipe.model.fed.clear()
    assert differences(before, snapshot(pipe)) == []


def test_without_a_cache_method_the_report_counts_the_steps():
    pipe = make()
    with fastdiff.accelerate(pipe) as handle:
        assert torch.equal(write(pipe), write(make()))
    assert handle.report.steps == handle.report.computed == len(pipe.model.fed)


@pytest.mark.parametrize("method", ["ab_cache", "deepcache", "first_block"])
def test_methods_for_images_refuse_text(method):
    pipe = make()
    with pytest.raises(UnsupportedModel, match=f"{method} is for image and video denoisers; llada2 is none"):
        fastdiff.accelerate(pipe, cache=method)
    assert "forward" not in vars(pipe.model)


@pytest.mark.parametrize("name", ["sd15", "sd3"])
def test_images_are_refused(name):
    pipe = tiny.make(name)
    with pytest.raises(UnsupportedModel, match="fast_dllm is for language models"):
        fastdiff.accelerate(pipe, cache="fast_dllm")
    assert "forward" not in vars(tiny.denoiser(pipe))


def test_a_model_without_a_cache_is_refused_before_anything_is_installed():
    pipe = make("forgetful")
    with pytest.raises(UnsupportedModel, match=r"ForgetfulLM\.forward does not take past_key_values, use_cache"):
        fastdiff.accelerate(pipe, cache="fast_dllm")
    assert "forward" not in vars(pipe.model) and "step" not in vars(pipe.scheduler)


def test_diffusion_gemma_is_refused_with_the_reason():
    class DiffusionGemmaPipeline:
        pass

    with pytest.raises(UnsupportedModel, match="keeps the keys and values of its prompt and finished blocks itself"):
        fastdiff.accelerate(DiffusionGemmaPipeline(), cache="fast_dllm")  # type: ignore[arg-type]


def test_settings_that_would_do_nothing_are_refused():
    with pytest.raises(BadConfig, match="has no use for order, warmup_steps"):
        fastdiff.accelerate(make(), cache={"method": "fast_dllm", "order": 3, "warmup_steps": 1})
    assert FastDLLM.model_validate(FastDLLM().model_dump()) == FastDLLM()


@pytest.mark.parametrize(
    ("rounding", "differences", "says"),
    [
        (1e-3, [3.9e-3, 0.0], EXACT),
        (1e-3, [3.9e-3, 4.1e-3], APPROXIMATE),
        (0.0, [0.9e-5, 0.9e-5], EXACT),
        (0.0, [1.1e-5], APPROXIMATE),
        (0.0, [float("nan")], APPROXIMATE),
        (float("nan"), [0.0], "everything computed"),
        (0.2, [0.0], "everything computed"),
        (0.0, [], OPEN),
    ],
)
def test_only_what_rounding_explains_counts_as_exact(rounding, differences, says):
    verdict = Verdict(1e-5, rounding)
    for difference in differences:
        assert verdict.asks(grown=True)
        verdict.add(difference, grown=True)
    assert says in str(verdict) and verdict.exact == (says == EXACT)


def test_compiling_unknown_blocks_is_refused():
    with pytest.raises(UnsupportedModel, match=r"set compile\.scope = denoiser"):
        fastdiff.accelerate(make(), cache="fast_dllm", compile={"enabled": True})
