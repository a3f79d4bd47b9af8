"""Pipelines that write text by diffusion: what they are to the rest of fastdiff, and when their runs end."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastdiff.anatomy import Anatomy, Family
from fastdiff.clock import StepClock
from fastdiff.errors import UnsupportedModel

_LLADA2 = Family("llada2", "language", split=(), guidance="none")


class TextClock(StepClock):
    """A clock for text: a step is one call of the model, and a block takes as many steps as it needs."""

    open_ended = True

    def attach(self) -> None:
        super().attach()
        self._listen("check_block_should_continue", self._decided)
        self._blocks = 0

    def _expect_run(self) -> None:
        super()._expect_run()
        self._blocks = 0

    def _decided(self, *args: Any, **kwargs: Any) -> None:
        """Ends the run with its last block. The scheduler's verdict is a pure function of what it is asked."""
        scheduler: Any = type(self._scheduler)
        if self.run is None or scheduler.check_block_should_continue(self._scheduler, *args, **kwargs):
            return
        self._blocks += 1
        all_blocks = self.pipe.num_timesteps // self._scheduler.num_inference_steps
        if self._blocks >= all_blocks or bool(kwargs["finished"].all()):
            self.abandon()


def clock_of(pipe: Any) -> StepClock:
    """The clock for this kind of pipeline."""
    return TextClock(pipe) if _is(pipe, "LLaDA2Pipeline") else StepClock(pipe)


def language_model(pipe: Any) -> Anatomy | None:
    """The model of a pipeline that writes text; None for other pipelines. Raises UnsupportedModel where nothing is
    left to cache."""
    if _is(pipe, "DiffusionGemmaPipeline"):
        raise UnsupportedModel(
            "DiffusionGemmaPipeline keeps the keys and values of its prompt and finished blocks itself and draws the "
            "open tokens of a block anew at every step; there is nothing left for fastdiff to cache"
        )
    if not _is(pipe, "LLaDA2Pipeline"):
        return None
    if not isinstance(pipe.model, nn.Module):
        raise UnsupportedModel(f"the model of this LLaDA2Pipeline is no torch module but {type(pipe.model).__name__}")
    return Anatomy(pipe.model, _LLADA2, "model")


def _is(pipe: Any, class_name: str) -> bool:
    """By name: not every supported diffusers has these classes."""
    return any(cls.__name__ == class_name for cls in type(pipe).__mro__)
