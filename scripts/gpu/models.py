"""SDXL and FLUX at their full size with random weights: milliseconds of computed and cached steps, waits, memory.

Random weights say nothing of quality, and nothing of what a threshold would skip: methods that decide by one are told
how often to skip.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from torch import nn

import fastdiff

from .bench import Bench, Row, spread, tried

_EVERY_THIRD = {"interval": 3, "warmup_steps": 2}
CACHES: dict[str, dict[str, Any]] = {
    "sdxl": {
        "deepcache": {"method": "deepcache", "interval": 3}, "ab_cache": {"method": "ab_cache", **_EVERY_THIRD},
        "taylorseer": {"method": "taylorseer", **_EVERY_THIRD},
        "tgate": {"method": "tgate", "gate": 0.5, "guidance": "keep"},
    },
    "flux": {
        "first_block": {
            "method": "first_block", "threshold": 1e9, "warmup_steps": 2, "max_consecutive_cached": 1,
        },
        "ab_cache stack": {"method": "ab_cache", "site": "stack", **_EVERY_THIRD},
        "taylorseer lite": {"method": "taylorseer", "lite": True, **_EVERY_THIRD},
    },
}  # fmt: skip
_COMPILED = {"compile": {"enabled": True}}
COMPILED: dict[str, dict[str, dict[str, Any]]] = {
    "sdxl": {"compiled": _COMPILED, "compiled deepcache": {**_COMPILED, "cache": CACHES["sdxl"]["deepcache"]}},
    "flux": {
        "compiled": _COMPILED, "compiled fp8": {**_COMPILED, "quant": {"method": "fp8"}},
        "compiled w8a8": {**_COMPILED, "quant": {"method": "w8a8"}},
        "compiled fp8 first_block": {**_COMPILED, "quant": {"method": "fp8"}, "cache": CACHES["flux"]["first_block"]},
    },
}  # fmt: skip
EAGER = {
    "w8a16": {"quant": {"method": "w8a16"}}, "w4a16": {"quant": {"method": "w4a16"}},
    # the memory that it is for: the floats wait on the CPU
    "w4a16 smallest": {"quant": {"method": "w4a16", "speed": "smallest", "vectors": "int4"}},
}  # fmt: skip


@dataclass
class Model:
    """A pipeline without text encoders, and what a call of it takes."""

    pipe: DiffusionPipeline
    told: dict[str, Any]
    bench: Bench

    def draw(self, steps: int | None = None) -> torch.Tensor:
        seed = torch.Generator(self.bench.device).manual_seed(0)
        told = self.told | ({"num_inference_steps": steps} if steps else {})
        latents: torch.Tensor = self.pipe(**told, generator=seed, output_type="latent")[0]
        return latents

    def row(self, config: Mapping[str, Any], steps: int | None = None) -> Row:
        """One install; a call that warms up, one that is heard for waits, and the timed ones."""
        row: Row = {"config": dict(config)}
        handle = fastdiff.accelerate(self.pipe, config)
        row |= self.bench.held()
        try:
            self.draw(steps)
            with self.bench.waits(row):
                self.draw(steps)
            seconds, calls, kinds = [], [], {False: [], True: []}  # type: ignore[var-annotated]
            with self.bench.memory(row):
                for _ in range(self.bench.rounds):
                    calls.append(1e3 * self.bench.once(lambda: self.draw(steps)))
                    report = handle.report
                    seconds.append(1e3 * report.seconds)
                    for index, one in enumerate(report.step_seconds[1:], 1):
                        kinds[report.is_cached(index)].append(1e3 * one)
            row |= spread(seconds) | {"steps": report.steps, "cached": report.cached, "notes": report.notes}
            row["call_ms"] = round(statistics.median(calls), 3)  # by events around it: the report must not say more
            row["host_ms"] = round(1e3 * sum(report.host_seconds), 2)
            row |= {"saved_ms": round(1e3 * report.saved_seconds(), 2), "cache_mb": round(report.cache_mb, 3)}
            names = {False: "computed_step_ms", True: "cached_step_ms"}
            return row | {names[kind]: round(statistics.median(v), 3) for kind, v in kinds.items() if v}
        finally:
            handle.restore()


def on_device(bench: Bench, make: Callable[[], nn.Module]) -> nn.Module:
    """Made on the card itself, in its dtype; weights of std 0.02: zeros would make products faster than they are."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(bench.dtype)
    try:
        with torch.device(bench.device), torch.random.fork_rng():
            torch.manual_seed(0)
            model = make().eval().requires_grad_(False)
            for module in model.modules():
                if isinstance(module, nn.Linear | nn.Conv2d):
                    nn.init.normal_(module.weight, std=0.02)
            return model
    finally:
        torch.set_default_dtype(before)


def sdxl(bench: Bench) -> Model:
    wide, heads, deep, side, text = (320, 640, 1280), (5, 10, 20), (1, 2, 10), 128, 2048
    if bench.dry:
        wide, heads, deep, side, text = (32, 32, 32), (1, 1, 1), (1, 1, 1), 8, 32
    unet = on_device(bench, lambda: diffusers.UNet2DConditionModel(
        sample_size=side, block_out_channels=wide, attention_head_dim=heads, transformer_layers_per_block=deep,
        layers_per_block=2, cross_attention_dim=text, use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    ))  # fmt: skip
    vae = on_device(bench, lambda: diffusers.AutoencoderKL(
        block_out_channels=(8,) * 4, latent_channels=4, norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    ))  # fmt: skip
    scheduler = diffusers.EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    pipe = diffusers.StableDiffusionXLPipeline(vae, None, None, None, None, unet, scheduler)
    texts = {
        name: torch.randn(1, *shape).to(bench.device, bench.dtype)
        for name, shape in (
            ("prompt_embeds", (77, text)), ("negative_prompt_embeds", (77, text)),
            ("pooled_prompt_embeds", (1280,)), ("negative_pooled_prompt_embeds", (1280,)),
        )
    }  # fmt: skip
    return _quiet(pipe, {**texts, "height": 8 * side, "width": 8 * side, "num_inference_steps": 12}, bench)


def flux(bench: Bench, double: int = 19, single: int = 38) -> Model:
    heads, size = (2, 64) if bench.dry else (24, 1024)
    transformer = on_device(bench, lambda: diffusers.FluxTransformer2DModel(
        num_layers=2 if bench.dry else double, num_single_layers=4 if bench.dry else single,
        num_attention_heads=heads, guidance_embeds=True,
    ))  # fmt: skip
    vae = on_device(bench, lambda: diffusers.AutoencoderKL(
        block_out_channels=(8,) * 4, latent_channels=16, norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    ))  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    pipe = diffusers.FluxPipeline(scheduler, vae, None, None, None, None, transformer)
    texts = {
        name: torch.randn(1, *shape).to(bench.device, bench.dtype)
        for name, shape in (("prompt_embeds", (32 if bench.dry else 512, 4096)), ("pooled_prompt_embeds", (768,)))
    }
    return _quiet(pipe, {**texts, "height": size, "width": size, "num_inference_steps": 8}, bench)


def _quiet(pipe: DiffusionPipeline, told: dict[str, Any], bench: Bench) -> Model:
    pipe.set_progress_bar_config(disable=True)
    return Model(pipe, told, bench)


def unets(bench: Bench) -> Iterator[Row]:
    yield from _measured(bench, "sdxl", sdxl(bench))


def transformers(bench: Bench) -> Iterator[Row]:
    needed = 30e9
    if bench.device.type == "cuda" and torch.cuda.mem_get_info(bench.device)[0] < needed:
        yield tried("flux extrapolated", lambda: _extrapolated(bench))
        return
    model = flux(bench)
    yield from _measured(bench, "flux", model)
    for name, config in EAGER.items():
        yield tried(f"flux {name}", lambda config=config: model.row(config, steps=2))  # type: ignore[misc]
    yield from _rivals(bench, model)


def _measured(bench: Bench, family: str, model: Model) -> Iterator[Row]:
    eager = tried(f"{family} eager", lambda: model.row({}))
    yield eager
    for name, cache in CACHES[family].items():
        yield _against(eager, tried(f"{family} {name}", lambda cache=cache: model.row({"cache": cache})))  # type: ignore[misc]
    for name, config in COMPILED[family].items():
        if bench.dry:
            config = {**config, "compile": {"enabled": True, "backend": "eager"}}
        yield _against(eager, tried(f"{family} {name}", lambda config=config: model.row(config)))  # type: ignore[misc]
        torch._dynamo.reset()
    yield _against(eager, tried(f"{family} eager again", lambda: model.row({})))  # what the clock of the card drifted


def _against(eager: Row, row: Row) -> Row:
    return row | ({"times_eager": round(eager["ms"] / row["ms"], 3)} if "ms" in eager and "ms" in row else {})


def _extrapolated(bench: Bench) -> Row:
    """Where all of FLUX does not fit: rest + 19 double + 38 single blocks, from the steps of three short ones."""
    found = []
    for double, single in ((3, 6), (6, 6), (3, 12)):
        found.append(flux(bench, double, single).row({}, steps=4)["computed_step_ms"])
        gc.collect()
        torch.cuda.empty_cache()
    one, two = (found[1] - found[0]) / 3, (found[2] - found[0]) / 6
    whole = found[0] + 16 * one + 32 * two
    return {"extrapolated": True, "double_ms": one, "single_ms": two, "computed_step_ms": round(whole, 3)}


def _rivals(bench: Bench, model: Model) -> Iterator[Row]:
    """As their own documentation installs them; skipping as often as our row does, where they can be told to."""
    yield tried("flux rival diffusers first block", lambda: _diffusers_first_block(bench, model))
    yield tried("flux rival cache-dit F1B0", lambda: _cache_dit(bench, model))
    yield tried("flux rival torchao fp8 compiled", lambda: _torchao(bench, model))  # the last: it cannot be taken back


def _diffusers_first_block(bench: Bench, model: Model) -> Row:
    denoiser = model.pipe.transformer
    denoiser.enable_cache(diffusers.FirstBlockCacheConfig(threshold=1e9))
    try:
        return _timed(bench, model)
    finally:
        denoiser.disable_cache()


def _cache_dit(bench: Bench, model: Model) -> Row:
    import cache_dit

    cache_dit.enable_cache(model.pipe, cache_config=cache_dit.DBCacheConfig(
        Fn_compute_blocks=1, Bn_compute_blocks=0, residual_diff_threshold=1e9, max_continuous_cached_steps=1,
        max_warmup_steps=2,
    ))  # fmt: skip
    try:
        return _timed(bench, model)
    finally:
        cache_dit.disable_cache(model.pipe)


def _torchao(bench: Bench, model: Model) -> Row:
    from torchao import quantization

    if bench.device.type == "cpu":
        return {"skipped": "its fp8 needs a card"}

    quantization.quantize_(model.pipe.transformer, quantization.Float8DynamicActivationFloat8WeightConfig())
    model.pipe.transformer.compile_repeated_blocks(fullgraph=True)
    return _timed(bench, model)


def _timed(bench: Bench, model: Model) -> Row:
    row: Row = {}
    model.draw()
    with bench.waits(row):
        model.draw()
    return row | spread([1e3 * bench.once(model.draw) for _ in range(bench.rounds)])
