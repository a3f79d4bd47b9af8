"""Calibration: what goes into each layer, by noise level, while a float model runs. No input is kept whole."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.clock import Run, StepClock
from fastdiff.errors import UnsupportedModel

from .activations import channels_of, given_to, rows_of
from .base import CHANNELS, VALUES, QuantMethod
from .build import Found
from .histogram import Histogram
from .packing import Tensors

_ROWS = 48  # tokens or pixels of each layer and bucket that are kept, for the search of ranges
_SHRINK = torch.linspace(1.0, 0.4, 25)


def _finite(name: str) -> Callable[[nn.Module, tuple, Tensor], None]:
    def look(layer: nn.Module, inputs: tuple, output: Tensor) -> None:
        if not bool(output.isfinite().all()):
            raise UnsupportedModel(
                f"{name} makes NaN or infinity of finite numbers in calibration; run the float model in float32, or "
                "mend its weights"
            )

    return look


@dataclass
class Seen:
    """Input of one layer: ranges of its channels by bucket, and some of its rows."""

    low: dict[int, Tensor] = field(default_factory=dict)
    high: dict[int, Tensor] = field(default_factory=dict)
    rows: dict[int, Tensor] = field(default_factory=dict)
    counts: dict[int, Histogram] | None = None  # where percentiles are wanted

    def add(self, bucket: int, rows: Tensor, generator: torch.Generator) -> None:
        low, high = rows.amin(0), rows.amax(0)
        if bucket in self.low:
            low, high = torch.minimum(low, self.low[bucket]), torch.maximum(high, self.high[bucket])
        self.low[bucket], self.high[bucket] = low, high
        if self.counts is not None:
            self.counts.setdefault(bucket, Histogram()).add(rows)
        some = rows[torch.randint(len(rows), (8,), generator=generator)].clone()
        kept = torch.cat([self.rows[bucket], some]) if bucket in self.rows else some
        if len(kept) > _ROWS:
            kept = kept[torch.randperm(len(kept), generator=generator)[:_ROWS]]
        self.rows[bucket] = kept

    @property
    def peak(self) -> Tensor:
        """Largest magnitude of each channel [c]: of the buckets the geometric mean, so that none rules."""
        largest = [torch.maximum(self.low[b].abs(), self.high[b].abs()) for b in sorted(self.low)]
        return torch.stack(largest).clamp_min(1e-6).log().mean(0).exp()


class Observer:
    """Looks at the inputs of float layers. `bucket` is set by whoever knows the step; None is outside a run.

    count: whether values are counted, for ranges by percentile.
    """

    def __init__(self, layers: list[Found], buckets: int, count: bool = False) -> None:
        self.layers, self.buckets = layers, buckets
        self.bucket: int | None = None
        self.run: Run | None = None
        self.times: dict[float, float] = {}  # noise share by what the denoiser was told of the time
        self.seen: dict[str, Seen] = {f.name: Seen(counts={} if count else None) for f in layers}
        self.partners: dict[str, str] = {}  # of each layer, the first that was given the same tensor
        self._generator = torch.Generator().manual_seed(0)
        self._last: tuple[Any, str, int] | None = None  # a tensor, the first layer it was given to, its channels
        self._share = 1.0

    def listen(self, clock: StepClock) -> None:
        """Follow a pipeline's steps; buckets hold as many steps each of a calibration run."""

        def called(step: Any) -> None:
            self.bucket = step.index * min(self.buckets, step.run.total) // step.run.total
            self.run, self._share = step.run, noise_share(step.run, step.index)

        def ended(run: Run) -> None:
            self.bucket = None

        clock.on_call.append(called)
        clock.on_end.append(ended)

    @contextmanager
    def watching(self, denoiser: nn.Module | None = None) -> Iterator[None]:
        """Looks at the layers, and at what the denoiser is told of the time."""
        with ExitStack() as hooks:
            hooks.callback(setattr, self, "_last", None)
            for f in self.layers:
                hooks.enter_context(f.layer.register_forward_pre_hook(self._hook(f.name), with_kwargs=True))
                hooks.enter_context(f.layer.register_forward_hook(_finite(f.name)))
            if denoiser is not None:
                hooks.enter_context(denoiser.register_forward_hook(self._timed, with_kwargs=True))
            yield

    def _timed(self, denoiser: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        time = told_time(args, kwargs)
        if time is not None and self.bucket is not None:
            self.times[time] = self._share

    def _hook(self, name: str) -> Callable[[nn.Module, tuple, dict[str, Any]], None]:
        def look(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            given = given_to(args, kwargs)
            x = given.detach()
            if self._last is not None and self._last[0]() is given and self._last[2] == channels_of(layer):
                self.partners.setdefault(name, self._last[1])
            else:
                self._last = (weakref.ref(given), name, channels_of(layer))
                self.partners.setdefault(name, name)
            rows = rows_of(x, layer).float().cpu()
            if not bool(rows.isfinite().all()):
                raise UnsupportedModel(
                    f"{name} was given NaN or infinity in calibration; calibrate in float32, or add it to quant.skip"
                )
            self.seen[name].add(-1 if self.bucket is None else self.bucket, rows, self._generator)

        return look

    def ranges(self, method: QuantMethod, halves: Mapping[str, int]) -> dict[str, Tensors]:
        """For each layer that was called: low, high [buckets + 1] after `smooth`, and `smooth` [channels] if wanted.

        halves: how many of a layer's input channels come from the deep half, where a skip connection joins.
        """
        found = {}
        for f in self.layers:
            seen = self.seen[f.name]
            if not seen.low:
                continue
            smooth = self._smooth(f, method, halves.get(f.name))
            low, high = self._edges(seen, smooth, method)
            found[f.name] = {"low": low, "high": high} | ({} if smooth is None else {"smooth": smooth})
        return found

    def _smooth(self, f: Found, method: QuantMethod, half: int | None) -> Tensor | None:
        """SmoothQuant's factors (https://arxiv.org/abs/2211.10438), one set for all layers that share an input."""
        if getattr(f.layer, "groups", 1) > 1:
            return None
        peak, factors = self.seen[f.name].peak, None
        if method.smooth == "percentile":
            factors = _clipping(peak, method.percentile or CHANNELS)
        elif method.smooth is not None:
            first = self.partners[f.name]
            sharing = [g.layer for g in self.layers if self.partners.get(g.name) == first]
            heaviest = torch.stack([_column_peaks(layer) for layer in sharing]).amax(0).clamp_min(1e-6)
            factors = (peak.pow(method.smooth) / heaviest.pow(1 - method.smooth)).clamp(1e-3, 1e3)
        elif method.split and half is not None:
            tops = torch.tensor([float(peak[:half].max()), float(peak[half:].max())])
            factors = (tops / tops.log().mean().exp()).repeat_interleave(torch.tensor([half, len(peak) - half]))
        return None if factors is None else factors.to(f.layer.weight.device)

    def _edges(self, seen: Seen, smooth: Tensor | None, method: QuantMethod) -> tuple[Tensor, Tensor]:
        inverse = torch.ones(()) if smooth is None else 1 / smooth.cpu()
        pairs = {}
        for bucket in seen.low:
            low = min(0.0, float((seen.low[bucket] * inverse).min()))
            high = max(0.0, float((seen.high[bucket] * inverse).max()))
            if seen.counts is not None and method.observer == "percentile":
                least, most = seen.counts[bucket].edges(method.percentile or VALUES)
                low, high = max(low, least), min(high, most)
            elif method.observer == "mse":
                low, high = _searched(seen.rows[bucket] * inverse, low, high)
            pairs[bucket] = low, high
        whole = (min(low for low, _ in pairs.values()), max(high for _, high in pairs.values()))
        table = [pairs.get(bucket, whole) for bucket in range(self.buckets)] + [whole]
        low_edges, high_edges = zip(*table, strict=True)
        return torch.tensor(low_edges), torch.tensor(high_edges)


def edges_of(run: Run, buckets: int) -> list[float]:
    """Noise shares, falling, at which the next bucket begins in a run like that of the calibration."""
    buckets = min(buckets, run.total)
    shares = [noise_share(run, index) for index in range(run.total)]
    starts = [-(-k * run.total // buckets) for k in range(1, buckets)]
    return [(shares[start - 1] + shares[start]) / 2 for start in starts]


def noise_share(run: Run, index: int) -> float:
    """Noise / (signal + noise) of the latents at a step: the same measure for all solvers, 1 where all is noise."""
    signal, noise = run.signal_and_noise(index)
    return noise / (signal + noise)


def told_time(args: tuple, kwargs: Mapping[str, Any]) -> float | None:
    """What a call of a denoiser says of the time: its argument `timestep`, or the second one; waits for the device."""
    given = kwargs.get("timestep", args[1] if len(args) > 1 else None)
    if given is None:
        return None
    flat = torch.as_tensor(given).flatten()
    return float(flat[0]) if len(flat) and not flat.is_complex() else None


def _column_peaks(layer: nn.Linear | nn.Conv2d) -> Tensor:
    """Largest magnitude of the weights of each input channel [c]."""
    return layer.weight.detach().abs().float().transpose(0, 1).flatten(1).amax(1).cpu()


def _clipping(peak: Tensor, percentile: float) -> Tensor:
    """DGQ's factors [c]: what brings a channel's peak down to this percentile of all channels' peaks, at least 1.

    Source: https://arxiv.org/abs/2310.04836, "percentile clipping", where a channel above is smoothed, not cut.
    """
    level = torch.quantile(peak, percentile / 100, interpolation="higher")
    return (peak / level).clamp_min(1)


def _searched(rows: Tensor, low: float, high: float) -> tuple[float, float]:
    """The range, shrunk to where 8-bit levels are nearest to the sampled values (p = 2.4)."""
    best, least = (low, high), float("inf")
    for factor in _SHRINK.tolist():
        a, b = low * factor, high * factor
        scale = max(b - a, 1e-12) / 255
        error = float((((rows.clamp(a, b) - a) / scale).round() * scale + a - rows).abs().pow(2.4).mean())
        if error < least:
            best, least = (a, b), error
    return best
