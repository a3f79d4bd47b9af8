"""The keys and values of a text's finished blocks, and whether keeping them changes what the model says."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastdiff.clock import Run

from .base import Forward
from .protocols import Live

Call = tuple[Tensor, Any, Tensor]  # tokens, attention mask, positions


@dataclass
class Verdict:
    """How the cached path of a model compares with its full forward, for blocks of one length.

    `rounding` is how far the two are apart on the same keys and values; `differences` how far keys and values from
    before put them apart, at consecutive ends of blocks. Two ends in a row that agree settle it for all: if a model's
    own blocks, of any length and offset, end at both, then they end at every one.
    """

    floor: float
    rounding: float | None = None
    differences: list[float] = field(default_factory=list)
    failed: bool = False

    @property
    def broken(self) -> bool:
        """Whether the model cannot make use of its own keys and values."""
        return self.rounding is not None and not self.rounding <= 0.1

    @property
    def exact(self) -> bool:
        return not self.failed and len(self.differences) >= 2

    def asks(self, grown: bool) -> bool:
        """Whether a call, the first of a block or a later one, should be compared."""
        return not self.failed and (self.rounding is None or (grown and not self.exact))

    def add(self, difference: float, grown: bool) -> None:
        if grown or not difference <= self._tolerance:
            self.differences.append(difference)
        self.failed = self.broken or not difference <= self._tolerance

    @property
    def _tolerance(self) -> float:
        return max(self.floor, 4 * (self.rounding or 0.0))

    def __str__(self) -> str:
        if self.broken:
            return f"everything computed: with its own cache the model's logits are {self.rounding:.1e} off"
        if not self.differences:
            return "prefix cache not verified: it is exact only if the model's attention is block-causal"
        measured = f"logits differ by up to {max(self.differences):.1e} of the largest, by rounding {self.rounding:.1e}"
        if self.failed:
            return f"prefix cache approximate, refreshed at every block: the model is not block-causal, {measured}"
        return f"prefix cache exact at {len(self.differences)} verified ends of blocks: {measured}"


class PrefixCache:
    """Calls a model on the tokens after the prefix that it has computed already.

    The tokens before the current block are final. Where block-causal attention is verified, nothing later changes
    their keys and values, so they are kept for the rest of the run, and a finished block is computed for the last
    time together with the next one. Elsewhere they are computed anew at every block, as in the paper.
    """

    def __init__(self, forward: Forward, session: Live, verify: bool) -> None:
        self._full, self._session, self._verify = forward, session, verify
        floats = (p.dtype for p in session.anatomy.denoiser.parameters() if p.is_floating_point())
        self._floor = max(1e-5, 2 * torch.finfo(next(floats, torch.float32)).eps)
        self._verdicts: dict[int, Verdict] = {}
        self._block = 0
        self._fed = self._plain = 0
        self._forget()
        session.clock.on_start.append(self._start)
        session.clock.on_output.append(self._learn)
        session.clock.on_end.append(self._end)

    def _start(self, run: Run) -> None:
        self._forget()
        self._block = self._fed = self._plain = 0

    def _learn(self, index: int, logits: Tensor) -> None:
        """The scheduler is given one block; its length is an argument of the pipeline that the model never sees."""
        self._block = logits.shape[1]

    def _end(self, run: Run) -> None:
        self._forget()
        if self._fed:
            self._session.recorder.note(f"{self._fed} of {self._plain} token positions computed")
            self._session.recorder.note(str(self._verdict()))

    def _forget(self) -> None:
        self._cache: Any = None
        self._tokens: Any = None

    def _verdict(self) -> Verdict:
        return self._verdicts.setdefault(self._block, Verdict(self._floor))

    def forward(self, input_ids: Tensor, attention_mask: Any = None, position_ids: Any = None, **more: Any) -> Any:
        """What the model returns, with logits of the last tokens only: at least of the current block."""
        masked_2d = attention_mask is None or attention_mask.ndim == 2
        if self._session.clock.now is None or more or position_ids is None or not masked_2d:
            return self._full(input_ids, attention_mask=attention_mask, position_ids=position_ids, **more)
        self._plain += input_ids.numel()
        known, call = self._known(input_ids), (input_ids, attention_mask, position_ids)
        if not known:
            return self._run(call, 0)
        verdict, grown = self._verdict(), input_ids.shape[1] > self._tokens.shape[1]
        if self._verify and verdict.asks(grown):
            return self._compared(call, known, verdict, grown)
        if verdict.broken or (grown and not verdict.exact):
            return self._run(call, 0)
        self._session.recorder.skipped()
        return self._run(call, known)

    def _compared(self, call: Call, known: int, verdict: Verdict, grown: bool) -> Any:
        """The full forward; how far the cached path is from it goes into the verdict."""
        cached = self._run(call, known).logits[:, -self._block :]
        output = self._run(call, 0)
        full = output.logits[:, -self._block :]
        if verdict.rounding is None:
            verdict.rounding = apart(self._run(call, known).logits[:, -self._block :], full)
        verdict.add(apart(cached, full), grown)
        return output

    def _known(self, tokens: Tensor) -> int:
        """How many cached positions are still true, as far as the tokens say."""
        if self._cache is None or not self._block:
            return 0
        before = self._tokens.shape[1]
        known = before - self._block
        if known <= 0 or len(tokens) != len(self._tokens) or tokens.shape[1] not in (before, before + self._block):
            return 0
        return known if torch.equal(tokens[:, :known], self._tokens[:, :known]) else 0

    def _run(self, call: Call, known: int) -> Any:
        """Call the model on the tokens after `known`; remember their keys and values."""
        tokens, mask, positions = call
        past = {}
        if known:
            self._cache.crop(known - self._tokens.shape[1])  # a negative number of positions to take off
            past["past_key_values"] = self._cache
        self._fed += tokens[:, known:].numel()
        output = self._full(
            tokens[:, known:], attention_mask=mask, position_ids=positions[:, known:], use_cache=True, **past
        )
        self._forget()
        found = getattr(output, "past_key_values", None)
        if croppable(found, tokens.shape[1]):
            self._cache, self._tokens = found, tokens.clone()  # the pipeline writes into its own
        else:
            self._session.recorder.note(f"no prefix to keep: the model gave {type(found).__name__}, not a plain cache")
        return output


def apart(logits: Tensor, full: Tensor) -> float:
    """The largest difference, in parts of the largest logit; equal infinities are equal."""
    difference = torch.where(logits == full, 0.0, (logits - full).abs().float()).max()
    return float(difference / full[full.isfinite()].abs().max())


def croppable(cache: Any, length: int) -> bool:
    """Whether a cache holds all positions of every layer, so that the last ones can be taken off again."""
    layers = getattr(cache, "layers", None) or []
    whole = all(getattr(layer, "is_croppable", True) and not getattr(layer, "is_sliding", False) for layer in layers)
    return bool(layers) and whole and cache.get_seq_length() == length
