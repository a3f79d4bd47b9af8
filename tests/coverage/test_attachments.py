"""What is put on a pipeline besides fastdiff, before or after: LoRA, IP-Adapters, offloading."""

from __future__ import annotations

from collections import Counter
from functools import cache
from itertools import permutations
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.group_offloading import ModuleGroup
from torch import Tensor, nn

import fastdiff
from fastdiff.errors import NotReversible
from fastdiff.patch import PatchSet
from tests import tiny
from tests.coverage.test_features import OF_A_TRANSFORMER, OF_A_UNET, adapted, aggressive, image, load_adapter, neutral
from tests.zoo_entry import noise

STEPS = 6
CPU = torch.device("cpu")
CASES = [("sd15", method) for method in OF_A_UNET] + [("flux", method) for method in OF_A_TRANSFORMER]
QUICK = (
    ("sd15", "deepcache"),
    ("sd15", "fora"),
    ("flux", "first_block"),
)
each = pytest.mark.parametrize(
    ("name", "method"), [case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow) for case in CASES]
)


def run(pipe: DiffusionPipeline, name: str, **changes: Any) -> Tensor:
    return tiny.run(pipe, name, steps=STEPS, **changes)


def close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


# LoRA


def lora(pipe: DiffusionPipeline, wanted: tuple[str, ...] = ("to_q", "to_v"), seed: int = 0) -> dict[str, Tensor]:
    """The weights of a LoRA on some layers of the denoiser, as its files have them."""
    component = "unet" if hasattr(pipe, "unet") else "transformer"
    found: dict[str, Tensor] = {}
    for number, (path, layer) in enumerate(tiny.denoiser(pipe).named_modules()):
        if path.rpartition(".")[2] in wanted and isinstance(layer, nn.Linear | nn.Conv2d):
            across = (layer.in_channels, *layer.kernel_size) if isinstance(layer, nn.Conv2d) else (layer.in_features,)
            up = (layer.out_channels, 4, 1, 1) if isinstance(layer, nn.Conv2d) else (layer.out_features, 4)
            found[f"{component}.{path}.lora_A.weight"] = 0.3 * noise(4, *across, seed=seed + number)
            found[f"{component}.{path}.lora_B.weight"] = 0.3 * noise(*up, seed=seed + number + 1000)
    assert found
    return found


@cache
def drawn(name: str, method: str = "") -> Tensor:
    """What a fresh pipeline makes, with aggressive settings of a method or none."""
    pipe = tiny.make(name)
    if method:
        fastdiff.accelerate(pipe, cache=aggressive(method))
    return run(pipe, name)


@cache
def tuned(name: str, method: str = "") -> Tensor:
    """The same with the LoRA."""
    pipe = tiny.make(name)
    pipe.load_lora_weights(lora(pipe))
    if method:
        fastdiff.accelerate(pipe, cache=aggressive(method))
    return run(pipe, name)


@each
def test_a_lora_of_before_is_exact_with_neutral_settings_and_is_obeyed_at_cached_steps(name, method):
    pipe = tiny.make(name)
    pipe.load_lora_weights(lora(pipe), adapter_name="one")
    plain = run(pipe, name)
    with fastdiff.accelerate(pipe, cache=neutral(method)):
        assert torch.equal(run(pipe, name), plain)
    handle = fastdiff.accelerate(pipe, cache=aggressive(method))
    found = run(pipe, name)
    assert handle.report.cached + handle.report.partly >= 1 and not torch.equal(found, plain)
    pipe.set_adapters("one", 0.2)
    assert not torch.equal(run(pipe, name), found)
    handle.restore()
    pipe.set_adapters("one", 1.0)
    assert torch.equal(run(pipe, name), plain)


@each
def test_a_lora_loaded_and_unloaded_while_accelerated_counts_as_long_as_it_is_there(name, method):
    pytest.importorskip("peft")
    pipe = tiny.make(name)
    handle = fastdiff.accelerate(pipe, cache=aggressive(method))
    assert torch.equal(run(pipe, name), drawn(name, method))
    pipe.load_lora_weights(lora(pipe))
    assert torch.equal(run(pipe, name), tuned(name, method))
    pipe.unload_lora_weights()
    assert torch.equal(run(pipe, name), drawn(name, method))
    handle.restore()
    assert torch.equal(run(pipe, name), drawn(name))


ORDERS = [
    order
    for order in permutations(("load", "accelerate", "unload", "restore"))
    if order.index("load") < order.index("unload") and order.index("accelerate") < order.index("restore")
]


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
@pytest.mark.parametrize(
    ("name", "method"),
    [("sd15", "fora"), pytest.param("sd15", "faster_diffusion", marks=pytest.mark.slow), ("flux", "fora")],
)
def test_whatever_the_order_the_pipeline_is_afterwards_what_it_was(name, method, order):
    pipe = tiny.make(name)
    states: dict[str, Any] = {}
    for what in order:
        if what == "load":
            pipe.load_lora_weights(lora(pipe))
        elif what == "unload":
            pipe.unload_lora_weights()
        elif what == "accelerate":
            states["handle"] = fastdiff.accelerate(pipe, cache=aggressive(method))
        else:
            states["handle"].restore()
        states[what] = run(pipe, name)
    assert torch.equal(states[order[-1]], drawn(name))
    both = order.index("restore") > order.index("load") and order.index("accelerate") < order.index("unload")
    last = max(order.index("load"), order.index("accelerate"))
    if both:
        assert torch.equal(states[order[last]], tuned(name, method))


def test_a_fused_lora_is_that_lora_and_comes_out_again():
    pipe = tiny.make("sd15")
    handle = fastdiff.accelerate(pipe, cache=aggressive("deepcache"))
    bare = run(pipe, "sd15")
    pipe.load_lora_weights(lora(pipe))
    loaded = run(pipe, "sd15")
    pipe.fuse_lora()
    assert close(run(pipe, "sd15"), loaded) and not close(loaded, bare)
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    assert close(run(pipe, "sd15"), bare)
    handle.restore()
    assert close(run(pipe, "sd15"), drawn("sd15"))


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_a_lora_on_the_very_layer_that_is_patched_leaves_no_trace(order):
    """faster_diffusion patches conv_in; peft puts a module of its own in its place."""
    pipe = tiny.make("sd15")
    handle = None
    for what in order:
        if what == "load":
            pipe.load_lora_weights(lora(pipe, ("conv_in",)))
        elif what == "unload":
            pipe.unload_lora_weights()
        elif what == "accelerate":
            handle = fastdiff.accelerate(pipe, cache=aggressive("faster_diffusion"))
        else:
            handle.restore()
        found = run(pipe, "sd15")
        assert torch.isfinite(found).all()
    assert torch.equal(found, drawn("sd15")) and "forward" not in vars(pipe.unet.conv_in)


@pytest.mark.parametrize("method", ["ab_cache", "deepcache", "fora", "tgate"])
def test_an_ip_adapter_loaded_and_unloaded_while_accelerated(method):
    fresh = adapted("sd15")
    fastdiff.accelerate(fresh, cache=aggressive(method))
    expected = run(fresh, "sd15", ip_adapter_image=image(1))
    pipe = adapted("sd15")
    pipe.unload_ip_adapter()
    pipe.register_modules(image_encoder=fresh.image_encoder, feature_extractor=fresh.feature_extractor)
    handle = fastdiff.accelerate(pipe, cache=aggressive(method))
    bare = run(pipe, "sd15")
    load_adapter(pipe)
    assert torch.equal(run(pipe, "sd15", ip_adapter_image=image(1)), expected)
    pipe.unload_ip_adapter()
    assert torch.equal(run(pipe, "sd15"), bare) and torch.equal(bare, drawn("sd15", method))
    handle.restore()
    assert torch.equal(run(pipe, "sd15"), drawn("sd15"))


# offloading


@pytest.fixture
def loads(monkeypatch) -> Counter:
    """How often the group of each module was brought to the device."""
    counts: Counter = Counter()
    onload = ModuleGroup.onload_

    def counted(group: ModuleGroup) -> None:
        counts.update(id(module) for module in group.modules)
        onload(group)

    monkeypatch.setattr(ModuleGroup, "onload_", counted)
    return counts


def offload(pipe: DiffusionPipeline, level: str) -> None:
    more = {"num_blocks_per_group": 1} if level == "block_level" else {}
    tiny.denoiser(pipe).enable_group_offload(onload_device=CPU, offload_device=CPU, offload_type=level, **more)


def inner(pipe: DiffusionPipeline) -> nn.Module:
    """A block that a cached step leaves out."""
    return pipe.unet.down_blocks[-1] if hasattr(pipe, "unet") else pipe.transformer.single_transformer_blocks[1]


OFFLOADED = [("sd15", "deepcache"), ("sd15", "ab_cache"), ("flux", "first_block"), ("flux", "ab_cache")]


@pytest.mark.parametrize("level", ["block_level", "leaf_level"])
@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize(("name", "method"), OFFLOADED)
def test_group_offload_loads_what_is_computed(name, method, first, level, loads):
    pipe = tiny.make(name)
    if first:
        offload(pipe, level)
        with fastdiff.accelerate(pipe, cache=neutral(method)):
            assert torch.equal(run(pipe, name), drawn(name))
    handle = fastdiff.accelerate(pipe, cache=aggressive(method))
    if not first:
        offload(pipe, level)
    loads.clear()
    assert torch.equal(run(pipe, name), drawn(name, method))
    calls = 2 if name in tiny.TWO_CALLS else 1
    leaves = (module for module in inner(pipe).modules() if isinstance(module, nn.Linear | nn.Conv2d))
    block = inner(pipe) if level == "block_level" else next(leaves)
    left_out = first or level == "leaf_level" or method == "ab_cache"  # a hook above the patch loads what is skipped
    assert loads[id(block)] == (handle.report.computed if left_out else STEPS) * calls
    handle.restore()
    loads.clear()
    assert torch.equal(run(pipe, name), drawn(name))
    assert loads[id(block)] == STEPS * calls


def test_a_lora_that_rebuilds_the_hooks_below_the_patches_is_told_of_and_restore_works():
    pipe = tiny.make("sd15")
    offload(pipe, "block_level")
    handle = fastdiff.accelerate(pipe, cache=aggressive("deepcache"))
    run(pipe, "sd15")
    assert not handle.report.notes
    pipe.load_lora_weights(lora(pipe))
    expected = run(pipe, "sd15")
    assert torch.equal(expected, tuned("sd15")), "the hooks that diffusers put anew are those of an unpatched model"
    assert any("accelerate the pipeline again" in note for note in handle.report.notes)
    handle.restore()
    assert torch.equal(run(pipe, "sd15"), expected)
    fastdiff.accelerate(pipe, cache=aggressive("deepcache"))
    assert torch.equal(run(pipe, "sd15"), tuned("sd15", "deepcache"))
    fastdiff.restore(pipe)
    pipe.unload_lora_weights()
    assert torch.equal(run(pipe, "sd15"), drawn("sd15"))


class Hook(ModelHook):
    """What group offloading puts on a module; with a stream it takes itself off after the first call."""

    def __init__(self, stream: Any) -> None:
        super().__init__()
        self.group = SimpleNamespace(stream=stream)


@pytest.mark.parametrize("stream", [None, object()], ids=["no stream", "stream"])
@pytest.mark.parametrize("removed", [True, False], ids=["removed", "kept"])
@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_hooks_of_diffusers_above_and_below_a_patch(first, removed, stream):
    module, patches = nn.Identity(), PatchSet()
    hooks = HookRegistry.check_if_exists_or_initialize(module)
    if first:
        hooks.register_hook(Hook(stream), "offload")
    patches.wrap_forward(module, lambda forward: lambda x: 2 * forward(x))
    if not first:
        hooks.register_hook(Hook(stream), "offload")
    assert module(3) == 6 and patches.lost() == []
    if removed:
        hooks.remove_hook("offload")
    gone = first and removed and stream is None  # with its hook, but the module is as it should be without it
    assert module(3) == (3 if gone else 6) and patches.lost() == ["Identity"] * gone
    patches.restore()
    assert module(3) == 3
    if not removed:
        hooks.remove_hook("offload")
    assert module(3) == 3


def test_a_foreign_patch_above_a_hook_is_still_refused():
    module, patches = nn.Identity(), PatchSet()
    HookRegistry.check_if_exists_or_initialize(module).register_hook(Hook(None), "offload")
    patches.wrap_forward(module, lambda forward: lambda x: 2 * forward(x))
    ours = module.forward
    module.forward = lambda x: ours(x) + 1
    with pytest.raises(NotReversible, match=r"Identity\.forward was changed"):
        patches.restore()
    assert module(3) == 7


@each
@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_model_offload_takes_its_hooks_off_and_on_at_every_call(name, method, first, request):
    pipe = tiny.make(name)
    request.addfinalizer(pipe.remove_all_hooks)  # from the text encoders, which other tests share
    if first:
        pipe.enable_model_cpu_offload(device="cpu")
    handle = fastdiff.accelerate(pipe, cache=aggressive(method))
    if not first:
        pipe.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        assert torch.equal(run(pipe, name), drawn(name, method))
        assert handle.report.cached + handle.report.partly >= 1
    assert "_hf_hook" in vars(tiny.denoiser(pipe))
    handle.restore()
    assert torch.equal(run(pipe, name), drawn(name))
