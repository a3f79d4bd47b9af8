"""Keys and values of single tokens, kept from one step after they were decoded, until all are computed anew."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdiff.clock import Run

from .base import Forward
from .prefix import Call, apart, croppable
from .protocols import Live


class DelayedCache:
    """Calls a model on the positions of the open block that were not decoded before the last step.

    A token that was decoded in the last step is fed once more, now as itself, and kept from then on. All rows of a
    batch are fed the same positions: those that are open in any of them. The model is tried first, where the positions
    are the last ones and where they have gaps: on the keys and values of a full forward both must say the same.
    """

    def __init__(self, forward: Forward, session: Live, interval: int) -> None:
        self._full, self._session, self._interval = forward, session, interval
        floats = (p.dtype for p in session.anatomy.denoiser.parameters() if p.is_floating_point())
        self._tolerance = max(1e-4, 4 * torch.finfo(next(floats, torch.float32)).eps)
        self._start()
        session.clock.on_start.append(self._start)
        session.clock.on_end.append(self._end)
        session.clock.solve = self._step

    def _start(self, run: Run | None = None) -> None:
        self._cache: Any = None
        self._tokens: Any = None
        self._logits: Any = None
        self._age = self._block = self._fed = self._plain = 0
        self._mask: int | None = None
        self._off: dict[bool, float] = {}  # how far the model is off with its own keys and values, with gaps or without
        self._editing = False

    def _end(self, run: Run) -> None:
        if self._fed:
            note = self._session.recorder.note
            note(f"{self._fed} of {self._plain} token positions computed")
            if self._editing:
                note("dkv_cache computed everything: editing needs all logits; call with editing_threshold = None")
            elif self._useless:
                off = max(self._off.values())
                note(f"dkv_cache computed everything: with its own cache the model's logits are {off:.1e} off")
        self._start()

    @property
    def _useless(self) -> bool:
        return any(not off <= self._tolerance for off in self._off.values())

    def _step(self, method: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        """The scheduler's step, which is told what the model never sees."""
        editing = kwargs.get("editing_threshold")
        if editing is None:
            editing = getattr(self._session.clock.scheduler.config, "editing_threshold", None)
        self._mask, self._editing = kwargs.get("mask_token_id"), (editing or 0.0) > 0
        self._block = kwargs["sample"].shape[1]
        return method(*args, **kwargs)

    def forward(self, input_ids: Tensor, attention_mask: Any = None, position_ids: Any = None, **more: Any) -> Any:
        """What the model returns; where positions were left out, with the block's logits, theirs from before."""
        call = (input_ids, attention_mask, position_ids)
        masked_2d = attention_mask is None or attention_mask.ndim == 2
        if self._session.clock.now is None or more or position_ids is None or not masked_2d:
            return self._full(input_ids, attention_mask=attention_mask, position_ids=position_ids, **more)
        self._plain += input_ids.numel()
        if self._interval == 1:
            self._fed += input_ids.numel()
            return self._full(input_ids, attention_mask=attention_mask, position_ids=position_ids)
        fed = self._open(input_ids)
        if fed is None:
            return self._whole(call)
        gaps = len(fed) < input_ids.shape[1] - int(fed[0])
        if gaps not in self._off:
            output = self._whole(call)
            if self._cache is not None:
                full = output.logits[:, fed]
                self._off[gaps] = apart(self._partly(call, fed).logits[:, fed], full)
            return output
        self._session.recorder.skipped()
        return self._partly(call, fed)

    def _open(self, tokens: Tensor) -> Tensor | None:
        """Positions to feed; None for all."""
        if self._cache is None or self._editing or self._useless or tokens.shape != self._tokens.shape:
            return None
        if self._age + 1 >= self._interval:
            return None
        fed = ((self._tokens == self._mask) | (tokens != self._tokens)).any(0)
        positions = fed.nonzero()[:, 0]
        inside = len(positions) and int(positions[0]) >= tokens.shape[1] - self._block
        return positions if inside else None

    def _whole(self, call: Call) -> Any:
        """The full forward; its keys and values are kept."""
        tokens, mask, positions = call
        self._cache = None
        self._fed += tokens.numel()
        output = self._full(tokens, attention_mask=mask, position_ids=positions, use_cache=True)
        found = getattr(output, "past_key_values", None)
        self._tokens, self._logits, self._age = tokens.clone(), output.logits, 0
        if croppable(found, tokens.shape[1]):
            self._cache = found
        else:
            self._session.recorder.note(f"nothing to keep: the model gave {type(found).__name__}, not a plain cache")
        return output

    def _partly(self, call: Call, fed: Tensor) -> Any:
        """A forward of some positions; the others' keys, values and logits are those of before."""
        tokens, mask, positions = call
        kept = torch.ones(tokens.shape[1], dtype=torch.bool, device=tokens.device)
        kept[fed] = False
        order = torch.cat([kept.nonzero()[:, 0], fed])
        self._take(order[: len(order) - len(fed)])
        self._fed += tokens[:, fed].numel()
        output = self._full(
            tokens[:, fed], attention_mask=None if mask is None else mask[:, order], position_ids=positions[:, fed],
            use_cache=True, past_key_values=self._cache,
        )  # fmt: skip
        self._take(order.argsort())
        self._tokens, self._age = tokens.clone(), self._age + 1
        logits = self._logits.clone()
        logits[:, fed - tokens.shape[1]] = output.logits
        output.logits = self._logits = logits
        return output

    def _take(self, positions: Tensor) -> None:
        """Keep the cached positions that are named, in this order."""
        for layer in self._cache.layers:
            layer.keys, layer.values = layer.keys[..., positions, :], layer.values[..., positions, :]
