"""Pipelines that write text by diffusion: what they are to the rest of fastdiff, and when their runs end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from fastdiff.anatomy import Anatomy, Family
from fastdiff.caching.base import CacheMethod
from fastdiff.caching.methods.apd import APD
from fastdiff.clock import StepClock
from fastdiff.errors import BadConfig, BadModel, UnsupportedModel

from .sources import first_line

_LLADA2 = Family("llada2", "language", split=(), guidance="none")


class TextClock(StepClock):
    """A clock for text: a step is one call of the model, and a block takes as many steps as it needs."""

    open_ended = True

    def attach(self) -> None:
        super().attach()
        self._blocks = 0

    def _expect_run(self, scheduler: Any) -> None:
        super()._expect_run(scheduler)
        self._blocks = 0

    def _branch(self, denoiser: str, args: tuple, kwargs: dict) -> int:
        """One call a step; what it is given are the very tokens that change."""
        return 0

    def _made(self, scheduler: Any, name: str, method: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        result = super()._made(scheduler, name, method, args, kwargs)
        if name == "check_block_should_continue" and self.run is not None and not result:
            self._blocks += 1
            all_blocks = self.pipe.num_timesteps // scheduler.num_inference_steps
            if self._blocks >= all_blocks or bool(kwargs["finished"].all()):
                self.abandon()
        return result


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


def with_verifier(method: CacheMethod, anatomy: Anatomy) -> CacheMethod:
    """An `apd` that holds its verifier, on the model's device and in its type; other methods as they are.

    Raises BadConfig for a directory that does not exist, BadModel for what cannot be read.
    """
    if not isinstance(method, APD) or isinstance(method.verifier, nn.Module):
        return method
    folder = Path(method.verifier).expanduser()
    if not folder.is_dir():
        raise BadConfig(f"cache.verifier: directory {str(folder)!r} does not exist")
    from transformers import AutoModelForCausalLM

    like = next(tensor for tensor in anatomy.denoiser.parameters() if tensor.is_floating_point())
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(str(folder), use_safetensors=True, dtype=like.dtype)
    except Exception as error:  # transformers and huggingface_hub each raise their own kinds
        raise BadModel(f"the verifier in {str(folder)!r} cannot be loaded: {first_line(error)}") from error
    return method.model_copy(update={"verifier": model.to(like.device).eval().requires_grad_(False)})


def _is(pipe: Any, class_name: str) -> bool:
    """By name: not every supported diffusers has these classes."""
    return any(cls.__name__ == class_name for cls in type(pipe).__mro__)
