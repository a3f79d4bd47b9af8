"""Rivals on diffusion transformers: cache-dit and diffusers' own caches."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from .peer import DiffusersCache, FasterCache, Fitted, Peer, Pyramid, TaylorSeer
from .prompts import prompts_for
from .twin import Clock, Twin

_DITS = ("StableDiffusion3Pipeline",)
_CONTEXT = "cache context set by the adapter around each denoiser call, state reset before each picture"
_CALIBRATORS = ("TaylorSeer", "DMD", "FoCa")
_NO_TEXT = "calibrator of the text stream off (enable_encoder_calibrator): SD3's last block returns no text"
_TEXT = "last block hands its text stream through (it returns None there, which the cache cannot subtract)"


@dataclass(frozen=True)
class CacheDit(Peer):
    """DBCache: skip the middle blocks while the first ones' residual changes little, or by a mask of steps.

    A calibrator forecasts what is skipped. That of the text stream is off, by the package's own setting: SD3's last
    block returns none, and the forecast of it ends in an error.
    """

    calibrator: str | None = None  # TaylorSeer, DMD or FoCa, each with the settings that it comes with
    mask: str | None = None  # one of its presets of computed steps

    def record(self) -> dict[str, Any]:
        return super().record() | {"calibrator": self.calibrator, "mask_policy": self.mask}

    def fit(self, twin: Twin) -> Fitted:
        import cache_dit

        _hush("cache_dit")
        calibrator = None
        if self.calibrator is not None:
            calibrator = getattr(cache_dit, f"{self.calibrator}CalibratorConfig")(enable_encoder_calibrator=False)
        config = cache_dit.DBCacheConfig(**self.settings)
        if self.mask is not None:
            config.steps_computation_mask = cache_dit.steps_mask(
                mask_policy=self.mask, total_steps=config.num_inference_steps
            )
        cache_dit.enable_cache(twin.pipe, cache_config=config, calibrator_config=calibrator)
        return Fitted(twin.pipe)


@dataclass(frozen=True)
class FirstBlock(DiffusersCache):
    """FirstBlockCache: skip all but the first block while its residual changes little."""

    def prepare(self, twin: Twin) -> None:
        _text_through(twin)

    def apply(self, twin: Twin, clock: Clock) -> None:
        from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache

        apply_first_block_cache(twin.denoiser, FirstBlockCacheConfig(**self.settings))


@dataclass(frozen=True)
class TaylorSeerLite(TaylorSeer):
    """Whole blocks return zeros, the last layer is forecast."""

    def prepare(self, twin: Twin) -> None:
        _text_through(twin)


@dataclass(frozen=True)
class Sea(DiffusersCache):
    """SeaCache: skip the stack while the filtered latent changes little, and extrapolate its residual."""

    def prepare(self, twin: Twin) -> None:
        _text_through(twin)

    def apply(self, twin: Twin, clock: Clock) -> None:
        from diffusers.hooks import SeaCacheConfig, apply_sea_cache

        def latents(module: nn.Module, args: tuple, kwargs: dict) -> list[Tensor]:
            return [latent[:, None] for latent in kwargs["hidden_states"]]  # a video of one frame

        apply_sea_cache(twin.denoiser, SeaCacheConfig(**self.settings, raw_vision_callback=latents))


@dataclass(frozen=True)
class MagCache(DiffusersCache):
    """MagCache: skip by the model's own ratios of residual magnitudes, which are measured on first use."""

    ratios: Ratios = field(default_factory=lambda: Ratios(None))

    def apply(self, twin: Twin, clock: Clock) -> None:
        from diffusers.hooks import MagCacheConfig, apply_mag_cache

        ratios = self.ratios.of(twin, self.settings["num_inference_steps"])
        apply_mag_cache(twin.denoiser, MagCacheConfig(**self.settings, mag_ratios=ratios))


@dataclass
class Ratios:
    """How much the residual of the block stack grows from step to step, by MagCache's own formula; measured once."""

    guidance_scale: float | None
    captions: int = 4
    known: dict[int, list[float]] = field(default_factory=dict)

    def of(self, twin: Twin, steps: int) -> list[float]:
        if steps not in self.known:
            self.known[steps] = self._measure(twin, steps)
        return self.known[steps]

    def _measure(self, twin: Twin, steps: int) -> list[float]:
        texts = list(prompts_for(twin.pipe, self.captions, 0, held_out=False).texts)
        magnitudes: list[Tensor] = []
        entered: list[Tensor] = []

        def enter(_: nn.Module, args: tuple, kwargs: dict) -> None:
            entered[:] = [kwargs["hidden_states"]]

        def leave(_: nn.Module, args: tuple, output: Any) -> None:
            hidden = output[1] if isinstance(output, tuple) else output
            magnitudes.append((hidden - entered[0]).float().norm(dim=-1))

        hooks = [
            twin.blocks[0].register_forward_pre_hook(enter, with_kwargs=True),
            twin.blocks[-1].register_forward_hook(leave),
        ]
        options = {} if self.guidance_scale is None else {"guidance_scale": self.guidance_scale}
        generators = [torch.Generator().manual_seed(1000 + k) for k in range(len(texts))]
        try:
            twin.pipe(texts, num_inference_steps=steps, generator=generators, output_type="latent", **options)
        finally:
            for hook in hooks:
                hook.remove()
        return [1.0, *(float((now / (before + 1e-8)).mean()) for before, now in pairwise(magnitudes))]


def _hush(package: str) -> None:
    """No progress reports on stdout, where the rows go: each module has a logger of its own that does not propagate."""
    for name in list(logging.root.manager.loggerDict):
        if name.partition(".")[0] == package:
            logging.getLogger(name).setLevel(logging.ERROR)


def _text_through(twin: Twin) -> None:
    """SD3's last block drops the text stream; nobody reads what it returns, but caches subtract it from its input."""
    last = twin.blocks[-1]
    inner = last.forward
    last.forward = wraps(inner)(_hand_through(inner))


def _hand_through(inner: Callable[..., Any]) -> Callable[..., Any]:
    def forward(hidden_states: Tensor, encoder_hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        text, hidden = inner(hidden_states, encoder_hidden_states, *args, **kwargs)
        return encoder_hidden_states if text is None else text, hidden

    return forward


def dit_peers(steps: int, guidance_scale: float | None) -> list[Peer]:
    return [*_dbcache(steps), *_masks(steps), *_diffusers(steps, guidance_scale)]


def _dbcache(steps: int) -> list[Peer]:
    """By threshold: few warm-up steps for short runs, and what its documentation has in its tables, last."""
    points: list[tuple[int, float, str | None]] = [
        (1, 0.08, None), (1, 0.16, None), (1, 0.3, None), (4, 0.08, None), (4, 0.16, None)
    ]  # fmt: skip
    points += [(1, threshold, name) for name in _CALIBRATORS for threshold in (0.16, 0.3)]
    few: dict[str, Any] = {"max_warmup_steps": 4}
    documented: dict[str, Any] = {"max_warmup_steps": 8, "max_continuous_cached_steps": 6}
    return [
        *(_cache_dit(f"F{first}B0 {threshold}", steps, first, name, residual_diff_threshold=threshold, **few)
          for first, threshold, name in points),
        *(_cache_dit("F1B0 0.5 W8 MC6", steps, 1, name, residual_diff_threshold=0.5, **documented)
          for name in (None, *_CALIBRATORS)),
    ]  # fmt: skip


def _masks(steps: int) -> list[Peer]:
    """By a mask of steps, static and, as its documentation advises, computing more where a threshold asks for it."""
    static: dict[str, Any] = {"steps_computation_policy": "static"}
    found = [(f"SCM {preset}", preset, static) for preset in ("slow", "medium", "fast", "ultra")]
    for preset, threshold in (("fast", 0.3), ("ultra", 0.35)):
        dynamic = {"steps_computation_policy": "dynamic", "residual_diff_threshold": threshold}
        found.append((f"SCM {preset} dynamic", preset, dynamic))
    return [
        _cache_dit(name, steps, 1, calibrator, preset, **by)
        for name, preset, by in found
        for calibrator in (None, *_CALIBRATORS)
    ]


def _cache_dit(
    name: str, steps: int, first: int, calibrator: str | None, mask: str | None = None, **others: Any
) -> Peer:
    settings = {"Fn_compute_blocks": first, "Bn_compute_blocks": 0, "num_inference_steps": steps, **others}
    notes = (_NO_TEXT,) if calibrator else ()
    title = f"DBCache {name}" + (f" + {calibrator}" if calibrator else "")
    return CacheDit(title, "cache-dit", settings, _DITS, calibrator, mask, notes=notes)


def _diffusers(steps: int, guidance_scale: float | None) -> list[Peer]:
    ratios = Ratios(guidance_scale)
    calibrated = f"ratios measured with this model on {ratios.captions} training captions; {_CONTEXT}"
    mag = {"max_skip_steps": 3, "retention_ratio": 0.2, "num_inference_steps": steps}
    return [
        *(FirstBlock(f"FirstBlockCache {t}", "diffusers", {"threshold": t}, _DITS, notes=(_CONTEXT, _TEXT))
          for t in (0.05, 0.1, 0.2)),
        *(TaylorSeer(f"TaylorSeer N={n}", "diffusers", {"cache_interval": n}, _DITS,
                     notes=(_CONTEXT, "factors in float32", "only attention is forecast")) for n in (3, 5)),
        *(TaylorSeerLite(f"TaylorSeer lite N={n}", "diffusers", {"cache_interval": n, "use_lite_mode": True}, _DITS,
                         notes=(_CONTEXT, "factors in float32", _TEXT)) for n in (2, 3, 5)),
        *(MagCache(f"MagCache {t}", "diffusers", {"threshold": t, **mag}, _DITS, ratios, notes=(calibrated,))
          for t in (0.06, 0.12, 0.24)),
        *(Pyramid(f"PAB {n}", "diffusers", {"spatial_attention_block_skip_range": n}, _DITS, notes=(_CONTEXT,))
          for n in (2, 4)),
        FasterCache("FasterCache", "diffusers", {}, _DITS, notes=(_CONTEXT, "halves pooled_projections too")),
        *(Sea(f"SeaCache {t}", "diffusers", {"threshold": t}, _DITS, notes=(_CONTEXT, _TEXT, "a video of one frame"))
          for t in (0.15, 0.3, 0.5)),
    ]  # fmt: skip
