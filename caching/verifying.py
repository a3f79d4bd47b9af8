"""Parallel decoding that a causal model checks: which of the open tokens of a block a step commits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.clock import Run
from fastdiff.errors import UnsupportedModel

from .base import Forward
from .protocols import Live


class Verifying:
    """In the place of the scheduler's choice of tokens; the model is called as before."""

    def __init__(self, forward: Forward, session: Live, verifier: nn.Module, ratio: float) -> None:
        self._full, self._session, self._verifier, self._ratio = forward, session, verifier, ratio
        self._causal = False
        self._start()
        session.clock.on_start.append(self._start)
        session.clock.on_end.append(self._end)
        session.clock.solve = self._step

    def _start(self, run: Run | None = None) -> None:
        self._call: Any = None
        self._noise: tuple[int, Tensor] | None = None
        self._committed, self._steps = 0.0, 0

    def _end(self, run: Run) -> None:
        if self._steps:
            self._session.recorder.note(f"apd: {self._committed / self._steps:.2f} tokens of a row committed a step")
        self._start()

    def forward(self, input_ids: Tensor, attention_mask: Any = None, position_ids: Any = None, **more: Any) -> Any:
        if self._session.clock.now is not None:
            self._call = (input_ids, attention_mask, position_ids)
        return self._full(input_ids, attention_mask=attention_mask, position_ids=position_ids, **more)

    def _step(self, method: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        """What the scheduler's step returns, with the tokens that are committed here."""
        sample, mask = kwargs["sample"], kwargs["mask_token_id"]
        is_open = sample == mask
        self._check(kwargs, is_open)
        draws = kwargs["sampling_method"] == "multinomial" or kwargs["sampling_method"] == "auto"
        temperature = kwargs["temperature"] if draws else 0.0
        noise = self._gumbel(kwargs, temperature)
        logits = kwargs["model_output"].float().clone()
        logits[..., mask] = -torch.inf
        own = logits.log_softmax(-1)
        proposed = _drawn(own, temperature, noise)
        target = proposed
        if self._ratio < 1 and bool(is_open.any()):
            theirs = self._verified(torch.where(is_open, proposed, sample), own, mask)
            target = _drawn(_mixed(own, theirs, self._ratio), temperature, noise)
        parted = is_open & (target != proposed)
        committed = is_open & (parted.cumsum(-1) - parted.int() == 0)
        self._steps += bool(is_open.any())  # the pipeline looks once more at a block that is done
        self._committed += int(committed.sum()) / len(committed)
        result = method(*args, **kwargs | {"temperature": 0.0})
        result.sampled_tokens, result.transfer_index = target, committed
        result.editing_transfer_index = torch.zeros_like(committed)
        result.prev_sample = torch.where(committed, target, sample)
        return result

    def _check(self, kwargs: dict, is_open: Tensor) -> None:
        """Raises UnsupportedModel for calls that ask for what this decoding has not."""
        if (kwargs.get("editing_threshold") or 0.0) > 0:
            raise UnsupportedModel("apd commits tokens for good; call the pipeline with editing_threshold = None")
        if (kwargs.get("top_p") or 1.0) < 1 or kwargs.get("top_k"):
            raise UnsupportedModel("apd mixes whole distributions; call the pipeline without top_p and top_k")
        steps, most = self._session.clock.scheduler.num_inference_steps, int(is_open.sum(-1).max())
        if int(kwargs["timestep"]) == 0 and steps < most:
            raise UnsupportedModel(
                f"apd is sure of one token a step: {most} open tokens need num_inference_steps = {most}, not {steps}"
            )

    def _gumbel(self, kwargs: dict, temperature: float) -> Tensor | None:
        """The noise of a block's positions, the same at all of its steps."""
        if temperature == 0:
            return None
        length, logits = self._call[0].shape[1], kwargs["model_output"]
        if self._noise is None or self._noise[0] != length:
            generator = kwargs.get("generator")
            device = logits.device if generator is None else generator.device
            drawn = torch.rand(logits.shape, generator=generator, device=device).clamp_min(1e-20)
            self._noise = (length, -(-drawn.log()).log().to(logits.device))
        return self._noise[1]

    def _verified(self, block: Tensor, own: Tensor, mask: int) -> Tensor:
        """The verifier's log probabilities of the block's tokens, each after the ones before it."""
        tokens, attention_mask, positions = self._call
        length, vocabulary = block.shape[1], own.shape[-1]
        tokens = torch.cat([tokens[:, :-length], block], 1)

        def logits(tokens: Tensor) -> Tensor:
            with torch.no_grad():
                found = self._verifier(tokens, attention_mask=attention_mask, position_ids=positions).logits
            if found.shape[-1] < vocabulary:
                raise UnsupportedModel(
                    f"the verifier knows {found.shape[-1]} tokens, the pipeline's model {vocabulary}"
                )
            return found[..., :vocabulary].float()

        found = logits(tokens)
        if not self._causal:
            other = tokens.clone()
            other[:, -1] = (other[:, -1] + 1) % vocabulary
            apart = (logits(other)[:, :-1] - found[:, :-1]).abs().max()
            if apart > 1e-3 * found.abs().max():
                raise UnsupportedModel(
                    "the verifier is not causal: its last token changes what it says of those before"
                )
            self._causal = True
        found[..., mask] = -torch.inf
        found = found.log_softmax(-1)
        before = found[:, -length - 1 : -1]
        return (
            before if before.shape[1] == length else torch.cat([own[:, :1], before], 1)
        )  # nothing is before the first


def _mixed(own: Tensor, theirs: Tensor, ratio: float) -> Tensor:
    """The logarithm of the product of powers; a probability of 0 to the power of 0 is 1."""
    return theirs if ratio == 0 else ratio * own + (1 - ratio) * theirs


def _drawn(scores: Tensor, temperature: float, noise: Tensor | None) -> Tensor:
    return (scores if noise is None else scores / temperature + noise).argmax(-1)
