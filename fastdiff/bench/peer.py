"""A rival: another cache on the same weights, seeds and scheduler, used as its authors mean it to be."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from fastdiff.errors import BackendUnavailable, UnsupportedModel
from fastdiff.machine import package_version

from .twin import Clock, Counter, Twin


@dataclass
class Running:
    """A contender at work: `call` takes what the pipeline takes, `pipe` holds the denoiser that is to be timed."""

    pipe: Any
    call: Callable[..., Any]
    computed: Callable[[], int | None] = lambda: None
    notes: Callable[[], list[str]] = list


@dataclass
class Fitted:
    """What a rival has made of the twin; `reset` forgets the last picture, before each call."""

    call: Callable[..., Any]
    reset: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Peer(ABC):
    """One rival with one setting."""

    name: str
    package: str  # the distribution, as pip knows it
    settings: dict[str, Any]
    pipelines: tuple[str, ...]  # classes of diffusers that it can be fitted to
    notes: tuple[str, ...] = field(default=(), kw_only=True)  # what the adapter does beyond calling the package

    def check(self, pipe: Any) -> None:
        """Raises BackendUnavailable or UnsupportedModel, with what to do."""
        if find_spec(self.package.replace("-", "_")) is None:
            raise BackendUnavailable(f"{self.package} is not installed: pip install 'fastdiff[peers]'")
        if not self.supports(pipe):
            raise UnsupportedModel(
                f"{self.name} is fitted to {' and '.join(self.pipelines)} here, not to {type(pipe).__name__}"
            )

    def supports(self, pipe: Any) -> bool:
        return type(pipe).__name__ in self.pipelines

    def record(self) -> dict[str, Any]:
        return {"package": self.package, "version": package_version(self.package), **self.settings}

    @contextmanager
    def installed(self, pipe: Any) -> Iterator[Running]:
        """The rival at work. It gets a twin, so `pipe` stays as it is."""
        self.check(pipe)
        twin = Twin(pipe)
        fitted = self.fit(twin)
        counter = Counter(twin)

        def call(*args: Any, **kwargs: Any) -> Any:
            fitted.reset()
            counter.reset()
            return fitted.call(*args, **kwargs)

        call.__signature__ = inspect.signature(pipe.__call__)  # type: ignore[attr-defined]
        yield Running(twin.pipe, call, lambda: counter.computed, lambda: list(self.notes))

    @abstractmethod
    def fit(self, twin: Twin) -> Fitted:
        """Install the rival on the twin."""


class DiffusersCache(Peer):
    """One of diffusers' own caches, applied by its function; what its pipelines would do for it is done here.

    The cache context is set around each call of the denoiser, from that call's timestep, and all state is forgotten
    before each picture: these pipelines do neither.
    """

    def fit(self, twin: Twin) -> Fitted:
        from diffusers.hooks import HookRegistry
        from diffusers.models.cache_utils import CacheMixin

        clock = Clock(twin)
        self.prepare(twin)
        self.apply(twin, clock)

        def in_context(inner: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                clock.see(args, kwargs)
                where = {"step_index": clock.step, "num_inference_steps": clock.total, "sigma": clock.timestep / 1000}
                with CacheMixin.cache_context(twin.denoiser, f"branch {clock.branch}", **where):
                    args, kwargs = self.arguments(args, kwargs)
                    return inner(*args, **kwargs)

            return forward

        twin.around_denoiser(in_context)
        registry = HookRegistry.check_if_exists_or_initialize(twin.denoiser)

        def reset() -> None:
            clock.reset()
            registry.reset_stateful_hooks()

        return Fitted(twin.pipe, reset)

    def prepare(self, twin: Twin) -> None:
        """Before the hooks are put on."""

    def arguments(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """The denoiser's arguments in the form that the cache understands."""
        return args, kwargs

    @abstractmethod
    def apply(self, twin: Twin, clock: Clock) -> None:
        """Call diffusers' function."""


@dataclass(frozen=True)
class Pyramid(DiffusersCache):
    """PyramidAttentionBroadcast: attention is computed every so many steps, everything else always."""

    def apply(self, twin: Twin, clock: Clock) -> None:
        from diffusers.hooks import PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast

        config = PyramidAttentionBroadcastConfig(**self.settings, current_timestep_callback=clock.now)
        apply_pyramid_attention_broadcast(twin.denoiser, config)


@dataclass(frozen=True)
class FasterCache(DiffusersCache):
    """FasterCache: the unconditional half of the batch is guessed in most of the later steps."""

    def apply(self, twin: Twin, clock: Clock) -> None:
        from diffusers.hooks import FasterCacheConfig, apply_faster_cache

        config = FasterCacheConfig(
            **self.settings,
            tensor_format="BCHW",
            attention_weight_callback=lambda _: 0.3,  # as in the documentation
            current_timestep_callback=clock.now,
            _unconditional_conditional_input_kwargs_identifiers=[
                "hidden_states", "encoder_hidden_states", "timestep", "pooled_projections",
            ],
        )  # fmt: skip
        apply_faster_cache(twin.denoiser, config)

    def arguments(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """A UNet gets one timestep for the whole batch; FasterCache halves every tensor, so it must be a batch too."""
        if len(args) > 1 and args[1].ndim == 0:
            args = (args[0], args[1].expand(args[0].shape[0]), *args[2:])
        return args, kwargs


@dataclass(frozen=True)
class TaylorSeer(DiffusersCache):
    """TaylorSeer: attention outputs (lite: the denoiser's last layer) are forecast by finite differences."""

    def apply(self, twin: Twin, clock: Clock) -> None:
        import torch
        from diffusers.hooks import TaylorSeerCacheConfig, apply_taylorseer_cache

        # the default of bfloat16 saves memory, which is not what is compared here
        apply_taylorseer_cache(
            twin.denoiser, TaylorSeerCacheConfig(**self.settings, taylor_factors_dtype=torch.float32)
        )
