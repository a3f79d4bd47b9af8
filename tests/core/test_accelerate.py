"""`accelerate`: twice, failing, shared, with other tools' hooks; attention backends; compile; LoRA."""

from __future__ import annotations

import warnings
from contextlib import contextmanager

import diffusers
import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch._dynamo.mutation_guard import install_generation_tagging_init

import fastdiff
from fastdiff.errors import BackendUnavailable, BadConfig, NotReversible, UnknownName, UnsupportedModel
from fastdiff.pipelines.attention import backends
from tests import tiny
from tests.state import differences, snapshot

AB = {"method": "ab_cache", "interval": 2, "warmup_steps": 1}
STEPS = 4


@pytest.fixture(scope="module", autouse=True)
def _dynamo_has_patched_torch_already():
    """The first compilation in a process changes nn.Module for good, whoever asks for it."""
    install_generation_tagging_init()


@pytest.fixture
def pipe():
    return tiny.make("pixart")


@contextmanager
def untouched(pipe):
    """Whatever happens inside, the pipeline is afterwards as it was, bit for bit."""
    tiny.run(pipe, "pixart", steps=2)
    before = snapshot(pipe)
    yield
    tiny.run(pipe, "pixart", steps=2)
    assert differences(before, snapshot(pipe)) == []


def test_accelerating_twice_replaces(pipe):
    with untouched(pipe):
        first = fastdiff.accelerate(pipe, cache=AB)
        second = fastdiff.accelerate(pipe, cache="first_block")
        assert second.active and not first.active
        first.restore()
        assert second.active, "an old handle takes nothing back"
        tiny.run(pipe, "pixart", steps=STEPS)
        assert second.report.steps == STEPS and str(first.report) == "nothing ran yet"
        second.restore()
        assert not second.active


@pytest.mark.parametrize(
    ("config", "error"),
    [
        ({"cache": "deepcache"}, UnsupportedModel),
        ({"cache": {"method": "first_block", "live_blocks": 99}}, BadConfig),
        ({"cache": "nothing"}, BadConfig),
        ({"attention": {"backend": "sage"}}, UnsupportedModel),
        ("no such preset", UnknownName),
    ],
)
def test_a_second_accelerate_that_fails_keeps_the_first(pipe, config, error):
    handle = fastdiff.accelerate(pipe, cache=AB)
    expected = tiny.run(pipe, "pixart", steps=STEPS)
    with pytest.raises(error):
        fastdiff.accelerate(pipe, config)
    assert handle.active
    assert torch.equal(tiny.run(pipe, "pixart", steps=STEPS), expected)
    assert handle.report.cached == 2


def test_the_context_manager_restores_after_an_exception_too(pipe):
    with untouched(pipe), pytest.raises(ZeroDivisionError), fastdiff.accelerate(pipe, cache=AB) as handle:
        assert handle.active
        _ = 1 / 0
    fastdiff.restore(pipe)
    assert not handle.active


def test_restore_by_pipeline(pipe):
    with untouched(pipe):
        handle = fastdiff.accelerate(pipe, cache=AB)
        assert handle.active
        fastdiff.restore(pipe)
        fastdiff.restore(pipe)
        assert not handle.active


def test_presets_paths_and_keywords_lead_to_the_same(pipe, tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('[cache]\nmethod = "ab_cache"\ninterval = 2\nwarmup_steps = 1')
    configs = [fastdiff.accelerate(pipe, source).config for source in (file, str(file), {"cache": AB})]
    configs.append(fastdiff.accelerate(pipe, cache=AB).config)
    configs.append(fastdiff.accelerate(pipe, configs[0]).config)
    assert all(config == configs[0] for config in configs)
    handle = fastdiff.accelerate(pipe, file, cache={"interval": 3})
    assert handle.config.cache.interval == 3 and handle.origins["cache.interval"] == "keyword"


def test_a_denoiser_shared_with_an_accelerated_pipeline_is_refused(pipe):
    handle = fastdiff.accelerate(pipe, cache=AB)
    other = diffusers.PixArtSigmaPipeline(**pipe.components)
    before = snapshot(other)
    with pytest.raises(UnsupportedModel, match="shared with a pipeline that is accelerated already"):
        fastdiff.accelerate(other)
    assert differences(before, snapshot(other)) == []
    handle.restore()
    fastdiff.accelerate(other).restore()


def test_a_pipeline_without_a_denoiser_is_refused():
    with pytest.raises(UnsupportedModel):
        fastdiff.accelerate(object())


@pytest.mark.parametrize("target", ["denoiser", "block", "processor"])
def test_restore_refuses_and_changes_nothing_if_somebody_patched_on_top(target):
    pipe = tiny.make("flux")
    tiny.run(pipe, "flux", steps=2)
    before = snapshot(pipe)
    handle = fastdiff.accelerate(pipe, cache="first_block", attention={"backend": "native"})
    block = pipe.transformer.transformer_blocks[0]
    owner, name = {
        "denoiser": (pipe.transformer, "forward"),
        "block": (block, "forward"),
        "processor": (block.attn.processor, "_attention_backend"),
    }[target]
    patched = snapshot(pipe)
    ours = vars(owner)[name]
    vars(owner)[name] = lambda *args, **kwargs: ours(*args, **kwargs)
    for _ in range(2):
        with pytest.raises(NotReversible, match=name):
            handle.restore()
        assert handle.active
    vars(owner)[name] = ours
    assert differences(patched, snapshot(pipe)) == []
    handle.restore()
    tiny.run(pipe, "flux", steps=2)
    assert differences(before, snapshot(pipe)) == []


def test_what_somebody_put_on_the_scheduler_stays_there_and_works_after_restore():
    """Nothing of ours lies in the scheduler that it could lie upon."""
    pipe = tiny.make("flux")
    plain = tiny.run(pipe, "flux", steps=2)
    handle = fastdiff.accelerate(pipe, cache="first_block")
    calls, inner = [], pipe.scheduler.step
    pipe.scheduler.step = lambda *args, **kwargs: calls.append(1) or inner(*args, **kwargs)
    tiny.run(pipe, "flux", steps=2)
    assert (handle.report.steps, len(calls)) == (2, 2)
    handle.restore()
    assert torch.equal(tiny.run(pipe, "flux", steps=2), plain) and len(calls) == 4


def test_offload_hooks_put_on_top_go_on_working_and_restore_goes_below_them(pipe):
    """What enable_model_cpu_offload does, without an accelerator."""
    hooks = pytest.importorskip("accelerate.hooks")
    plain = tiny.run(pipe, "pixart", steps=STEPS)
    handle = fastdiff.accelerate(pipe, cache=AB)
    cached = tiny.run(pipe, "pixart", steps=STEPS)
    hooks.add_hook_to_module(pipe.transformer, hooks.ModelHook())
    assert torch.equal(tiny.run(pipe, "pixart", steps=STEPS), cached) and not torch.equal(cached, plain)
    try:
        handle.restore()
    except NotReversible as refused:
        assert "undo that change first" in str(refused)
        hooks.remove_hook_from_module(pipe.transformer)
        handle.restore()
    assert torch.equal(tiny.run(pipe, "pixart", steps=STEPS), plain)


def test_a_model_that_has_offload_hooks_already_is_accelerated_below_them(pipe):
    hooks = pytest.importorskip("accelerate.hooks")
    plain = tiny.run(pipe, "pixart", steps=STEPS)
    hooks.add_hook_to_module(pipe.transformer, hooks.ModelHook())
    handle = fastdiff.accelerate(pipe, cache=AB)
    assert not torch.equal(tiny.run(pipe, "pixart", steps=STEPS), plain) and handle.report.cached == 2
    handle.restore()
    assert torch.equal(tiny.run(pipe, "pixart", steps=STEPS), plain)


# LoRA


def add_lora(pipe) -> None:
    from peft import LoraConfig

    config = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(4)
        tiny.denoiser(pipe).add_adapter(config)


@pytest.mark.parametrize("method", ["ab_cache", "deepcache"])
def test_lora_loaded_before_or_after_gives_the_same_picture(method):
    pytest.importorskip("peft")
    settings = {"method": method, "interval": 2}
    results = []
    for before in (True, False):
        pipe = tiny.make("sd15")
        if before:
            add_lora(pipe)
        with fastdiff.accelerate(pipe, cache=settings):
            bare = tiny.run(pipe, "sd15", steps=STEPS)
            if not before:
                add_lora(pipe)
            results.append(tiny.run(pipe, "sd15", steps=STEPS))
        plain = tiny.make("sd15")
        add_lora(plain)
        assert torch.equal(tiny.run(pipe, "sd15", steps=STEPS), tiny.run(plain, "sd15", steps=STEPS))
    assert torch.equal(*results) and not torch.equal(results[1], bare)


# attention


@pytest.mark.parametrize("name", ["flux", "sd15", "sd3"])
@pytest.mark.parametrize("backend", [backend.value for backend in AttentionBackendName])
def test_every_backend_works_or_is_refused_in_one_sentence(name, backend):
    """Pytest runs offline, so kernels that must be fetched count as absent."""
    pipe = tiny.make(name)
    active, checks = _AttentionBackendRegistry._active_backend, _AttentionBackendRegistry._checks_enabled
    before = snapshot(pipe)
    try:
        handle = fastdiff.accelerate(pipe, attention={"backend": backend})
    except (BackendUnavailable, UnsupportedModel) as refused:
        assert backend in str(refused) and "\n" not in str(refused)
    else:
        handle.restore()
        tiny.run(pipe, name, steps=1)
        before = snapshot(pipe)
        with fastdiff.accelerate(pipe, attention={"backend": backend}):
            assert torch.isfinite(tiny.run(pipe, name, steps=1)).all()
        tiny.run(pipe, name, steps=1)
    assert _AttentionBackendRegistry._active_backend is active
    assert _AttentionBackendRegistry._checks_enabled is checks
    assert differences(before, snapshot(pipe)) == []


def test_the_list_of_backends_is_that_of_diffusers():
    assert backends() == sorted(backend.value for backend in AttentionBackendName)


@pytest.mark.parametrize("backend", ["native", "_native_math", "flex"])
def test_flux_gives_close_pictures_with_the_backends_a_cpu_has(backend):
    pipe = tiny.make("flux")
    plain = tiny.run(pipe, "flux", steps=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # uncompiled flex attention says that it is slow
        with fastdiff.accelerate(pipe, attention={"backend": backend}):
            processors = {type(p._attention_backend) for p in pipe.transformer.attn_processors.values()}
            other = tiny.run(pipe, "flux", steps=2)
    assert processors == {AttentionBackendName}
    assert torch.allclose(other, plain, rtol=1e-3, atol=1e-4)
    assert torch.equal(tiny.run(pipe, "flux", steps=2), plain)


@pytest.mark.parametrize("name", ["flux", "sd15", "sd3"])
def test_xformers_is_refused_on_a_cpu(name):
    with pytest.raises(BackendUnavailable, match="'xformers' does not run on cpu in float32 here"):
        fastdiff.accelerate(tiny.make(name), attention={"backend": "xformers"})


def test_an_unknown_backend_gets_a_suggestion():
    with pytest.raises(UnknownName, match="unknown attention backend 'xformer', did you mean 'xformers'"):
        fastdiff.accelerate(tiny.make("flux"), attention={"backend": "xformer"})


# compile


@pytest.mark.slow
@pytest.mark.parametrize("cache", [None, "first_block"])
def test_compiled_flux_gives_close_pictures_and_restore_removes_it(cache):
    pipe = tiny.make("flux")
    tiny.run(pipe, "flux", steps=3)
    before = snapshot(pipe)
    expected = tiny.run(pipe, "flux", steps=3)
    if cache is not None:
        with fastdiff.accelerate(pipe, cache=cache):
            expected = tiny.run(pipe, "flux", steps=3)
    handle = fastdiff.accelerate(pipe, compile={"enabled": True}, **({"cache": cache} if cache else {}))
    assert torch.allclose(tiny.run(pipe, "flux", steps=3), expected, rtol=1e-3, atol=1e-4)
    handle.restore()
    tiny.run(pipe, "flux", steps=3)
    assert differences(before, snapshot(pipe)) == []


@pytest.mark.slow
def test_compiled_unets_give_close_pictures():
    pipe = tiny.make("sd15")
    with fastdiff.accelerate(pipe, cache={"method": "deepcache", "interval": 2}):
        expected = tiny.run(pipe, "sd15", steps=3)
    with fastdiff.accelerate(pipe, cache={"method": "deepcache", "interval": 2}, compile={"enabled": True}):
        assert torch.allclose(tiny.run(pipe, "sd15", steps=3), expected, rtol=1e-3, atol=1e-4)
