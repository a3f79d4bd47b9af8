"""What each rank of a group checks; run by real processes, see ranks.py. Latents are compared in float64."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastdiff
from fastdiff.errors import BadConfig, FastdiffError, PeerLost
from fastdiff.parallel.attention import Intercept
from fastdiff.parallel.unet import rows_of
from fastdiff.pipelines import accelerate as installing
from tests import tiny
from tests.coverage.test_attachments import lora
from tests.state import differences, snapshot

EXACT = 1e-12
TALL = {"height": 192}  # rows for three ranks: the tiny UNets halve their rows three times


def size(name: str) -> dict[str, int]:
    return TALL if name in tiny.UNETS else {}


def pipeline(name: str, dtype: torch.dtype = torch.float64) -> Any:
    """Shared text encoders are left in float32 for others: each of these processes is its own."""
    return tiny.make(name).to(dtype)


def latents(pipe: Any, name: str, steps: int = 4, **changes: Any) -> Tensor:
    out = pipe(**(tiny.arguments(name, steps) | size(name) | changes))[0]
    return torch.stack(list(out)) if isinstance(out, list) else out


def moved(found: Tensor, wanted: Tensor, start: Tensor | float = 0.0) -> float:
    return float((found - wanted).norm() / (wanted - start).norm())


def digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


def exact(name: str, method: str, dtype: torch.dtype = torch.float64, bound: float = EXACT, **changes: Any) -> dict:
    """One pipeline, alone and then split; each has to be itself again afterwards."""
    pipe = pipeline(name, dtype)
    alone = latents(pipe, name, **changes)
    before = snapshot(pipe)
    handle = fastdiff.accelerate(pipe, parallel=method)
    found = latents(pipe, name, **changes)
    assert not torch.equal(found, torch.zeros_like(found)) and moved(found, alone) < bound, moved(found, alone)
    report = handle.report
    handle.restore()
    left = [text for text in differences(before, snapshot(pipe)) if not text.startswith("scheduler.model_outputs")]
    assert left == [], left
    assert torch.equal(latents(pipe, name, **changes), alone)
    return {"digest": digest(found), "sent": report.ranks[handle.rank]["sent"], "notes": report.notes}


def every_family_in_patches(rank: int, ranks: int) -> dict:
    return {name: exact(name, "patch") for name in tiny.FAMILIES}


def every_family_in_halves(rank: int, ranks: int) -> dict:
    return {name: exact(name, "cfg") for name in tiny.FAMILIES if ranks == 2}


def every_transformer_by_heads(rank: int, ranks: int) -> dict:
    return {name: exact(name, "ulysses") for name in ("sd3", "flux", "pixart", "wan")}


def in_float32(rank: int, ranks: int) -> dict:
    return {name: exact(name, "patch", torch.float32, 2e-5) for name in ("sd15", "sd3")}


def odd_rows(rank: int, ranks: int) -> dict:
    """19 and 25 rows of latents: the last rank's are cut short at every level."""
    return {str(rows): exact("sd15", "patch", height=8 * rows, width=64) for rows in (24 + 1, 16 + 3)}


def denoisers_alone(rank: int, ranks: int) -> float:
    """One call of a UNet, so that no solver makes differences small."""
    pipe = pipeline("sdxl")
    found: list[Tensor] = []

    def seen(module: Any, args: Any, output: Any) -> None:
        found.append(output[0])

    hook = pipe.unet.register_forward_hook(seen)
    latents(pipe, "sdxl", 1)
    with fastdiff.accelerate(pipe, parallel="patch"):
        latents(pipe, "sdxl", 1)
    hook.remove()
    assert moved(found[1], found[0]) < EXACT
    return float(found[0].std())


def several_pictures(rank: int, ranks: int) -> dict:
    changes = {"prompt": ["a red cat", "a dog"], "negative_prompt": ["bad", "worse"], "num_images_per_prompt": 2}
    return {name: exact(name, "patch", **changes) for name in ("sd15", "flux")}


def decoded(rank: int, ranks: int) -> dict:
    found = {name: exact(name, {"method": "patch", "vae": True}, output_type="pt") for name in ("sd15", "sd3")}
    assert found["sd3"]["sent"]["halo"] > 0, "its transformer has no convolutions: what decoding sends is counted"
    return found


def weights_that_came_before_and_after(rank: int, ranks: int) -> None:
    """A LoRA on attention and on convolutions."""
    wanted = ("to_q", "to_v", "conv1")
    pipe = pipeline("sd15")
    pipe.load_lora_weights(lora(pipe, wanted))
    alone = latents(pipe, "sd15")
    with fastdiff.accelerate(pipe, parallel="patch"):
        assert moved(latents(pipe, "sd15"), alone) < EXACT
    later = pipeline("sd15")
    plain = latents(later, "sd15")
    handle = fastdiff.accelerate(later, parallel="patch")
    later.load_lora_weights(lora(later, wanted))
    assert moved(latents(later, "sd15"), alone) < EXACT < moved(plain, alone)
    handle.restore()
    assert torch.equal(latents(later, "sd15"), alone)


def controlled(rank: int, ranks: int) -> None:
    """What a ControlNet adds is cut into rows too."""
    import diffusers

    base = pipeline("sd15")
    torch.manual_seed(1)
    net = diffusers.ControlNetModel.from_unet(base.unet)
    for weight in net.parameters():
        weight.data.add_(0.05 * torch.randn_like(weight))
    pipe = diffusers.StableDiffusionControlNetPipeline(**base.components, controlnet=net).to(torch.float64)
    pipe.set_progress_bar_config(disable=True)
    picture = torch.rand(1, 3, 192, 64, generator=torch.Generator().manual_seed(3))
    alone, plain = latents(pipe, "sd15", image=picture), latents(base, "sd15")
    with fastdiff.accelerate(pipe, parallel="patch"):
        assert moved(latents(pipe, "sd15", image=picture), alone) < EXACT < moved(plain, alone)


def picture_to_picture_and_another_size(rank: int, ranks: int) -> None:
    import diffusers

    pipe = diffusers.StableDiffusionImg2ImgPipeline(**pipeline("sd15").components)
    pipe.set_progress_bar_config(disable=True)
    arguments = {k: v for k, v in tiny.arguments("sd15", 8).items() if k not in ("height", "width", "generator")}

    def drawn(rows: int) -> Tensor:
        torch.manual_seed(0)
        picture = torch.rand(1, 3, 8 * rows, 64, dtype=torch.float64)
        return pipe(image=picture, strength=0.5, generator=torch.Generator().manual_seed(1), **arguments)[0]

    alone = [drawn(rows) for rows in (24, 32)]
    with fastdiff.accelerate(pipe, parallel={"method": "distrifusion", "warmup_steps": 9}) as handle:
        for rows, wanted in zip((24, 32, 24), (*alone, alone[0]), strict=True):
            assert moved(drawn(rows), wanted) < EXACT
        assert any("covers all 4 steps" in note for note in handle.report.notes)


def strangers_become_alike(rank: int, ranks: int) -> list[str]:
    """Each rank has another seed and another prompt; rank 0's count."""
    pipe = pipeline("sd15")
    own = {"generator": torch.Generator().manual_seed(rank), "prompt": f"prompt {rank}"}
    with fastdiff.accelerate(pipe, parallel="patch"):
        found = latents(pipe, "sd15", **own)
    wanted = latents(pipe, "sd15", generator=torch.Generator().manual_seed(0), prompt="prompt 0")
    assert moved(found, wanted) < EXACT
    noisy = {"eta": 1.0, "generator": None}  # a solver that draws noise at every step
    torch.manual_seed(rank)
    with fastdiff.accelerate(pipe, parallel="patch") as handle:
        by_chance = latents(pipe, "sd15", **noisy)
        assert handle.report.notes == []
        latents(pipe, "sd15", **noisy | {"generator": torch.Generator().manual_seed(rank)})
        assert any("the ranks ended with different latents" in note for note in handle.report.notes)
    torch.manual_seed(0)
    assert moved(by_chance, latents(pipe, "sd15", **noisy)) < EXACT
    pipe = pipeline("flux")  # of its two calls a step one is alike
    with fastdiff.accelerate(pipe, parallel="patch"):
        asked = latents(pipe, "flux", prompt=f"prompt {rank}")
    assert moved(asked, latents(pipe, "flux", prompt="prompt 0")) < EXACT
    return [digest(found), digest(by_chance), digest(asked)]


def partly_conditioned(rank: int, ranks: int) -> None:
    """Synchronous PCPP is one device whose self-attention is masked: queries of a part see the rows next to it."""
    cases = (("sd15", {"height": 256}, (32, 8), 4, 0.4), ("pixart", {}, (4, 4), 1, 0.5))
    for name, changes, rows, unit, portion in cases:
        pipe, calls = pipeline(name), list[int]()
        plain = latents(pipe, name, 3, **changes)
        hook = tiny.denoiser(pipe).register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        with Intercept(_masked(rows, rows_of(rows[0], unit, ranks), portion, calls)):
            wanted = latents(pipe, name, 3, **changes)
        hook.remove()
        method = {"method": "pcpp", "portion": portion, "synchronous": True, "warmup_steps": 0}
        with fastdiff.accelerate(pipe, parallel=method):
            found = latents(pipe, name, 3, **changes)
        assert moved(found, wanted) < EXACT < moved(plain, wanted), (name, moved(found, wanted))


def _masked(size: tuple[int, int], parts: list[tuple[int, int]], portion: float, calls: list[int]) -> Any:
    def attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, **options: Any) -> Tensor:
        count = query.shape[-2]
        if len(calls) > 1 and attn_mask is None and key.shape[-2] == count:  # the first step sees all
            level = round((size[0] * size[1] / count) ** 0.5)
            row, attn_mask = size[1] // level, torch.zeros(count, count, dtype=torch.bool)
            shown = [math.ceil(portion * (end - begin) / level) for begin, end in parts]
            for k, (begin, end) in enumerate(parts):
                first = begin // level - (shown[k - 1] if k else 0)
                last = end // level + (shown[k + 1] if k + 1 < len(parts) else 0)
                attn_mask[begin // level * row : end // level * row, first * row : last * row] = True
        return F.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask, **options)

    return attend


def displaced(rank: int, ranks: int) -> dict[str, float]:
    return errors(8, 16)


def displaced_in_many_steps(rank: int, ranks: int) -> dict[str, float]:
    return errors(32, 64)


def errors(*counts: int) -> dict[str, float]:
    """How far from one device, relative to the way the latents went, by number of steps and by method. The warm-up
    covers the same share of the way, where a solver of noise goes fastest."""
    found = {}
    for name in ("sd15", "sd3"):
        for steps in counts:
            pipe, start = pipeline(name), list[Tensor]()
            alone = latents(pipe, name, steps, guidance_scale=1.0, callback_on_step_end=_first(start))
            for label, method in METHODS.items():
                if label == "distrifusion" or (steps == counts[0] and (name == "sd3" or "portion" not in label)):
                    parallel = {"warmup_steps": steps // 8} | method
                    with fastdiff.accelerate(pipe, parallel=parallel):
                        result = latents(pipe, name, steps, guidance_scale=1.0)
                    found[f"{name} {label} {steps}"] = moved(result, alone, start[0])
    return found


METHODS = {
    "distrifusion": {"method": "distrifusion"},
    "pcpp portion 0": {"method": "pcpp", "portion": 0.0},
    "pcpp portion 0.5": {"method": "pcpp", "portion": 0.5},
    "pcpp portion 1": {"method": "pcpp", "portion": 1.0},
    "pcpp synchronous": {"method": "pcpp", "portion": 0.3, "synchronous": True},
    "pcpp refreshed": {"method": "pcpp", "portion": 0.0, "refresh": 1},
    "int8": {"method": "patch", "codec": "int8"},
    "residual": {"method": "patch", "codec": "residual"},
}


def stepping(rank: int, ranks: int) -> dict[str, float]:
    """How far ParaStep is from one device, by solver, order of the prediction, and number of steps."""
    import diffusers

    found = {}
    kinds = {"euler": diffusers.EulerDiscreteScheduler, "dpm++": diffusers.DPMSolverMultistepScheduler}
    for label, kind in kinds.items():
        for steps in (16, 32):
            pipe, start = pipeline("sd15"), list[Tensor]()
            pipe.scheduler = kind.from_config(pipe.scheduler.config, timestep_spacing="trailing")
            call = {"guidance_scale": 1.0}
            alone = latents(pipe, "sd15", steps, callback_on_step_end=_first(start), **call)
            for order in (1, 2):
                method = {"method": "parastep", "warmup_steps": steps // 8, "order": order}
                with fastdiff.accelerate(pipe, parallel=method) as handle:
                    found[f"{label} {order} {steps}"] = moved(latents(pipe, "sd15", steps, **call), alone, start[0])
                    (states,) = handle.report.branches.values()
                    assert states.count("computed") == steps // 8 + (steps - steps // 8) // ranks
    return found


def _first(kept: list[Tensor]) -> Any:
    def callback(pipe: Any, step: int, timestep: Any, kwargs: dict) -> dict:
        kept.append(kwargs["latents"])
        return kwargs

    return callback


def replayed(rank: int, ranks: int) -> None:
    """A model that ignores its latents leaves nothing to predict: every solver must come out as on one device."""
    import diffusers

    for kind in (diffusers.DPMSolverMultistepScheduler, diffusers.UniPCMultistepScheduler, diffusers.DDIMScheduler):
        pipe = pipeline("sd15")
        pipe.scheduler = kind.from_config(pipe.scheduler.config)
        pipe.unet.conv_in.weight.data.zero_()
        alone = latents(pipe, "sd15", 11)
        with fastdiff.accelerate(pipe, parallel={"method": "parastep", "warmup_steps": 2}):
            assert moved(latents(pipe, "sd15", 11), alone) < EXACT, kind.__name__


def a_lost_cycle_is_computed_again(rank: int, ranks: int) -> None:
    """Whoever is left of the first cycle goes on from its beginning: all is as on one device, but where the pipeline
    gives each picture a guidance of its own."""
    own = {"guidance_rescale": 0.7, "num_images_per_prompt": 2}
    within: list[Any] = []  # crews that lose a rank at the cycle's second call, not at its end
    halfway = {"callback_on_step_end": lambda pipe, step, *_: (step == 2 and within[-1]._lost(PeerLost("gone"))) or {}}
    for name, changes in [*((name, {}) for name in tiny.FAMILIES), ("sd15", own), ("sd3", halfway)]:
        pipe = pipeline(name)
        alone = latents(pipe, name, 6, **(changes if changes is own else {}))
        method = {"method": "parastep", "warmup_steps": 2, "on_peer_loss": "local"}
        with fastdiff.accelerate(pipe, parallel=method) as handle:
            assert handle.crew is not None
            within.append(handle.crew)
            gather = handle.crew.bus.gather

            def lost(kind: str, *rest: Any, gather: Any = gather) -> list[Tensor]:
                if kind == "step":
                    raise PeerLost("gone")
                return gather(kind, *rest)

            handle.crew.bus.gather = lost  # type: ignore[method-assign]
            far, notes = moved(latents(pipe, name, 6, **changes), alone), handle.report.notes
        bound = 0.1 if changes is own else 1e-7 if name == "cogvideox" else EXACT  # which adds guidance in float32
        assert far < bound and notes[0] == "gone; this rank finished alone", f"{name}: {far} {notes}"
        assert any("stayed a guess" in note for note in notes) == (changes is own), notes


CACHES = {
    "deepcache": {"method": "deepcache", "interval": 2},
    "first_block": {"method": "first_block", "threshold": 1e9, "max_consecutive_cached": 1},
    "ab_cache": {"method": "ab_cache", "interval": 2},
    "verify": {"method": "ab_cache", "interval": 2, "guard": "verify", "verify_bound": 0.5},
    "ab_cache stack": {"method": "ab_cache", "interval": 2, "site": "stack"},
    "easycache": {"method": "easycache", "warmup_steps": 1, "threshold": 1e9, "max_consecutive_cached": 1},
}
PAIRS = [("sd15", "deepcache"), ("sd15", "ab_cache"), ("sd15", "easycache"), ("sd3", "first_block"),
         ("sd3", "ab_cache stack"), ("flux", "ab_cache"), ("flux", "first_block"), ("wan", "first_block"),
         ("sd15", "verify"), ("flux", "verify")]  # fmt: skip


def cached(rank: int, ranks: int) -> dict[str, list[int]]:
    """Each pair of a model and a cache with every third method, beginning with another."""
    return skipping(3, rank, ranks)


def cached_everywhere(rank: int, ranks: int) -> dict[str, list[int]]:
    return skipping(1, rank, ranks)


def skipping(every: int, rank: int, ranks: int) -> dict[str, list[int]]:
    """Methods with caches: exact ones equal the cache on one device, all skip what it skips."""
    found = {}
    for number, (name, cache) in enumerate(PAIRS):
        pipe = pipeline(name)
        handle = fastdiff.accelerate(pipe, cache=CACHES[cache])
        alone, skipped = latents(pipe, name, 6), handle.report.cached
        pattern = handle.report.branches[0]
        assert skipped >= 1, (name, cache)
        for method in ("patch", "distrifusion", "pcpp", "cfg", "ulysses", "parastep")[number % every :: every]:
            if (method == "ulysses" and name in tiny.UNETS) or (method == "cfg" and ranks != 2):
                continue
            parallel = {"method": method} | ({"warmup_steps": 1} if method not in ("patch", "cfg", "ulysses") else {})
            if (method, cache) == ("parastep", "verify"):
                with pytest.raises(BadConfig, match=r"needs all steps of a run on each rank.*set cache.guard = none"):
                    fastdiff.accelerate(pipe, cache=CACHES[cache], parallel=parallel)
                continue
            handle = fastdiff.accelerate(pipe, cache=CACHES[cache], parallel=parallel)
            result, report = latents(pipe, name, 6), handle.report
            found[f"{name} {cache} {method}"] = [report.cached, report.ranks[rank]["oldest"]]
            assert torch.isfinite(result).all()
            if method in ("patch", "cfg", "ulysses"):
                assert moved(result, alone) < 1e-11, (name, cache, method, moved(result, alone))
            if method != "parastep":
                assert report.cached == skipped
            elif CACHES[cache].get("interval") == 2:  # a rank's own steps count, not those between
                for states in report.branches.values():
                    own = [state for state in states if state != "absent"]
                    assert own == pattern[: len(own)], (name, cache, states)
        handle.restore()
    return found


def in_graphs(rank: int, ranks: int) -> dict:
    """Blocks are compiled with the layers that talk in them."""
    skips = {"cache": CACHES["first_block"]}
    found = {"sd3 distrifusion": compiled("sd3", "distrifusion", 4, **skips)}
    pipe = pipeline("sd3")
    alone = latents(pipe, "sd3")
    graphs = {"enabled": True, "backend": "eager"}
    with fastdiff.accelerate(pipe, parallel={"method": "patch", "on_peer_loss": "local"}, compile=graphs) as handle:
        assert handle.crew is not None
        swap = handle.crew.bus.swap

        def lost(kind: str, *rest: Any) -> dict[int, Tensor]:
            if kind == "kv" and handle.clock.index == 2:
                raise PeerLost("gone")
            return swap(kind, *rest)

        handle.crew.bus.swap = lost  # type: ignore[method-assign]
        assert moved(latents(pipe, "sd3"), alone) < EXACT
        assert handle.report.notes == ["gone; this rank finished alone"], "an error goes through the operator"
    return found


def in_more_graphs(rank: int, ranks: int) -> dict:
    """The other families and methods; the stages of a UNet, and its inputs, have a graph for each size. Those that talk
    around the denoiser, cfg and parastep, leave it whole, too."""
    return {
        "flux patch": compiled("flux", "patch", 4, cache=CACHES["first_block"]),
        "sd3 cfg": compiled("sd3", "cfg", 2, "denoiser"),
        "sd3 parastep": compiled("sd3", "parastep", 2, "denoiser"),
        "sd15 distrifusion": compiled("sd15", "distrifusion", 40),
        **{f"{name} pcpp": compiled(name, "pcpp", 2) for name in ("wan", "pixart", "cogvideox")},
        "flux ulysses": compiled("flux", "ulysses", 4),
        "wan cfg": compiled("wan", "cfg", 2),
        "sd3 aot": compiled("sd3", "distrifusion", 2, backend="aot_eager"),
    }


def compiled(
    name: str, method: str, most: int, scope: str = "blocks", backend: str = "eager", **levers: Any
) -> dict[str, str]:
    """What is compiled gives what it gave before; no step after the first of a kind makes a graph."""
    from torch._dynamo.mutation_guard import install_generation_tagging_init
    from torch._dynamo.utils import counters

    pipe = pipeline(name)
    parallel = {"method": method} | ({"warmup_steps": 1} if method not in ("patch", "cfg", "ulysses") else {})
    handle = fastdiff.accelerate(pipe, parallel=parallel, **levers)
    wanted, cached = latents(pipe, name), handle.report.cached
    assert (cached > 0) is bool(levers)
    handle.restore()
    install_generation_tagging_init()  # what dynamo changes of nn.Module once and for all
    before, stats = snapshot(pipe), counters["stats"]
    graphs = {"enabled": True, "scope": scope, "backend": backend, "fullgraph": True}
    handle = fastdiff.accelerate(pipe, parallel=parallel, compile=graphs, **levers)
    began = stats["unique_graphs"]
    result = latents(pipe, name)
    made = stats["unique_graphs"]
    assert 0 < made - began <= most, f"{name} {method}: {made - began} graphs"
    assert moved(result, wanted) < EXACT and handle.report.cached == cached, moved(result, wanted)
    latents(pipe, name, 6)
    assert stats["unique_graphs"] == made, f"{name} {method}: a longer run made a graph"
    handle.restore()
    ran = ("scheduler.", "pipe._num_timesteps")
    left = [text for text in differences(before, snapshot(pipe)) if not text.startswith(ran)]
    assert left == [] and not [op for op in vars(torch.ops.fastdiff_parallel) if op.startswith("talk")], left
    return {"digest": digest(result)}


def renewed(rank: int, ranks: int) -> list[int]:
    """What caching leaves out for long is not used when it is too old."""
    pipe = pipeline("sd3")
    oldest = []
    for max_age in (1, 3, 9):
        parallel = {"method": "distrifusion", "warmup_steps": 0, "max_age": max_age}
        handle = fastdiff.accelerate(
            pipe, cache={"method": "ab_cache", "interval": 3, "site": "stack"}, parallel=parallel
        )
        latents(pipe, "sd3", 10)
        oldest.append(handle.report.ranks[rank]["oldest"])
    return oldest


def counted(rank: int, ranks: int) -> dict[str, Any]:
    """Bytes against what the shapes say, for SD3 in float32: 4 blocks of joint attention, batch 2, width 32."""
    pipe = pipeline("sd3", torch.float32)
    found = {}
    for label, method in {
        "patch": {"method": "patch"},
        "pcpp": {"method": "pcpp", "portion": 0.5, "warmup_steps": 0},
    }.items():
        handle = fastdiff.accelerate(pipe, parallel=method)
        latents(pipe, "sd3", 4)
        found[label] = handle.report.ranks[rank]["sent"]["kv"]
        handle.restore()
    return found


def still(rank: int, ranks: int) -> None:
    """Corrected group normalization is exact where the input does not change from step to step."""
    pipe = pipeline("sd15")
    pipe.unet.conv_in.weight.data.zero_()
    pipe.unet.time_embedding.linear_1.weight.data.zero_()
    gradient = torch.linspace(0, 1, 24, dtype=torch.float64)[:, None]
    conv, whole = pipe.unet.conv_in, gradient.expand(24, 8)
    shares = rows_of(24, 4, ranks)

    def painted(module: Any, args: Any, output: Tensor) -> Tensor:
        begin, end = (0, 24) if output.shape[-2] == 24 else shares[rank]
        return output + whole[begin:end]

    hook = conv.register_forward_hook(painted)
    alone = latents(pipe, "sd15", 6)
    with fastdiff.accelerate(pipe, parallel={"method": "distrifusion", "warmup_steps": 0}):
        assert moved(latents(pipe, "sd15", 6), alone) < EXACT
    hook.remove()


def broken_off(rank: int, ranks: int) -> list[str]:
    """An exception on the last rank ends all; the next call is clean."""
    pipe = pipeline("sd15")
    alone = latents(pipe, "sd15")
    said = []
    for method in ("distrifusion", "parastep"):
        handle = fastdiff.accelerate(pipe, parallel={"method": method, "warmup_steps": 1})

        def fails(pipe: Any, step: int, timestep: Any, kwargs: dict) -> dict:
            if step == 2 and rank == ranks - 1:
                raise KeyError("a mistake in a callback")
            return kwargs

        try:
            latents(pipe, "sd15", 8, callback_on_step_end=fails)
            said.append("went through")
        except (FastdiffError, KeyError) as error:
            said.append(f"{type(error).__name__}: {error}")
            assert handle.crew is not None and not handle.crew.bus._groups, "the others are told at once"
        with fastdiff.accelerate(pipe, parallel="patch"):
            assert moved(latents(pipe, "sd15"), alone) < EXACT
        handle.restore()
    return said


def refused(rank: int, ranks: int) -> dict[str, str]:
    """Bad input; nothing is installed then."""
    said = {}

    def refuse(label: str, name: str, call: dict | None = None, **levers: Any) -> None:
        pipe = pipeline(name, torch.float32)
        latents(pipe, name)
        before = snapshot(pipe)
        try:
            handle = fastdiff.accelerate(pipe, **levers)
            latents(pipe, name, **(call or {}))
            handle.restore()
            said[label] = "went through"
        except FastdiffError as error:
            said[label] = str(error)
            fastdiff.restore(pipe)
        left = [text for text in differences(before, snapshot(pipe)) if not text.startswith("scheduler.")]
        assert left == [], f"{label}: {left}"

    refuse("rows", "sd15", {"height": 32}, parallel="patch")
    refuse("world", "sd15", parallel={"method": "patch", "devices": 7})
    refuse("heads", "flux", parallel="ulysses") if ranks == 3 else None
    refuse("unet heads", "sd15", parallel="ulysses")
    refuse("compiled", "sd15", parallel="patch", compile={"enabled": True, "scope": "denoiser"})
    refuse("vae", "cogvideox", parallel={"method": "patch", "vae": True})
    version, installing.__version__ = installing.__version__, f"0.{rank}"
    refuse("versions", "sd15", parallel="patch")
    installing.__version__ = version
    refuse("configs", "sd15", parallel={"method": "pcpp", "portion": 0.1 * (rank + 1)})
    for label in ("weights", "kinds"):
        pipe = pipeline("sd15", torch.float32)
        pipe.unet.conv_in.bias.data.add_(rank)
        if label == "kinds" and rank:
            pipe.to("meta")  # stands for a GPU
        try:
            fastdiff.accelerate(pipe, parallel="patch")
            said[label] = "went through"
        except FastdiffError as error:
            said[label] = str(error)
    return said


def alone(rank: int, ranks: int) -> str:
    """A launcher that started a single process and says nothing."""
    pipe = pipeline("sd3")
    before = snapshot(pipe)
    try:
        fastdiff.accelerate(pipe, parallel="patch")
    except FastdiffError as error:
        assert differences(before, snapshot(pipe)) == []
        return str(error)
    raise AssertionError("one process is no parallel run")


def meshes(rank: int, ranks: int) -> dict:
    """Two axes at a time."""
    return meshed("sd3")


def more_meshes(rank: int, ranks: int) -> dict:
    return meshed("flux")


def meshed(name: str) -> dict:
    pairs = {
        "cfg x patch": {"method": "patch", "cfg": 2},
        "cfg": {"method": "cfg"},
        "cfg x ulysses": {"method": "ulysses", "cfg": 2},
    }
    found = {label: exact(name, method, steps=2) for label, method in pairs.items()}
    for label, method in (
        ("cfg x step", {"method": "parastep", "cfg": 2, "warmup_steps": 2}),
        ("step x patch", {"method": "patch", "step": 2, "warmup_steps": 2}),
        ("cfg x pcpp", {"method": "pcpp", "cfg": 2, "warmup_steps": 1}),
    ):
        pipe = pipeline("sd15")
        alone = latents(pipe, "sd15", 8)
        with fastdiff.accelerate(pipe, parallel=method):
            result = latents(pipe, "sd15", 8)
        assert 0 < moved(result, alone) < 0.1, label
        found[label] = {"digest": digest(result)}
    return found


def ended_early(rank: int, ranks: int) -> dict:
    """A run that is told to end early, and one that is interrupted, are reported; a cycle of steps is not left open."""
    pipe, out = pipeline("sdxl"), {}
    alone = latents(pipe, "sdxl", 12, denoising_end=0.5)
    for method in ("distrifusion", {"method": "parastep", "warmup_steps": 1, "order": 2}):
        handle = fastdiff.accelerate(pipe, parallel=method)
        found = latents(pipe, "sdxl", 12, denoising_end=0.5)
        assert moved(found, alone) < 0.5 and (handle.report.steps, handle.report.total) == (6, 6)
        assert handle.report.bytes_sent > 0 and len(handle.report.ranks) == ranks
        assert handle.crew.cycle is None or not handle.crew.cycle._passed, "the last cycle was settled"
        out[str(method)] = {"digest": digest(found)}

    def interrupt(pipe: Any, step: int, _t: Any, given: dict) -> dict:
        pipe._interrupt = step == 3
        return given

    handle = fastdiff.accelerate(pipe, parallel="patch")
    latents(pipe, "sdxl", 8, callback_on_step_end=interrupt)
    assert handle.report.steps == 4 and handle.report.bytes_sent > 0
    pipe._interrupt = False
    out["after"] = {"digest": digest(latents(pipe, "sdxl", 4))}
    return out


def guided_for_a_part(rank: int, ranks: int) -> dict:
    """Wan calls its transformer once a step when guidance is switched off, and twice when it is on."""
    out = {}
    for name, scales in {"off": (4.0, 4.0, 1.0, 1.0, 4.0, 4.0), "last": (4.0, 4.0, 4.0, 4.0, 1.0, 1.0)}.items():

        def switch(pipe: Any, step: int, _t: Any, given: dict, scales: tuple[float, ...] = scales) -> dict:
            pipe._guidance_scale = scales[min(step + 1, 5)]
            return given

        out[name] = exact(
            "wan", "cfg", steps=6, guidance_scale=scales[0], negative_prompt="bad", callback_on_step_end=switch
        )
    return out
