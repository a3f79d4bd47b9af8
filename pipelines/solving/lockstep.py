"""Runs of one pipeline that wait for each other at every solver step, so that a step can be settled for all of them.

Each run has a thread, a shallow copy of the pipeline and a scheduler of its own; only one of them moves at a time.
That way the loop is the pipeline's own, with its guidance, its second denoiser and its conditions, whatever they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import wraps
from threading import Semaphore, Thread
from typing import Any

import torch

from .combine import At


class _Closed(BaseException):
    """Ends the thread of a run that nobody needs any more."""


Dress = Callable[[Any], AbstractContextManager[Any]]  # what is put on a pipeline before its run, and taken off after


class Loop:
    """One pipeline call, advanced a solver step at a time."""

    def __init__(self, pipe: Any, scheduler: Any, call: Mapping[str, Any], dress: Dress = nullcontext) -> None:
        self._pipe, self._call = twin(pipe, scheduler), call
        self._dressed = ExitStack()
        self._dressed.enter_context(dress(self._pipe))
        scheduler.step = self._paused(scheduler.step)
        self._theirs, self._ours = Semaphore(0), Semaphore(0)
        self._next: torch.Tensor | None = None
        self._at: At | None = None
        self._error: BaseException | None = None
        self._closed = False
        kind = pipe.device.type  # autocast is a thread's own affair
        dtype, on = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        self._autocast = torch.autocast(kind, dtype) if on else nullcontext()
        self._thread = Thread(target=self._run, daemon=True)

    def advance(self, state: torch.Tensor | None = None) -> At | None:
        """Go on with these latents, up to the next step; None at the end of the run. Raises what the run raised."""
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._next = state
            self._theirs.release()
        self._ours.acquire()
        if self._error is not None:
            raise self._error
        return self._at

    def close(self) -> None:
        """End the run wherever it is."""
        self._closed = True
        self._theirs.release()
        if self._thread.ident is not None:
            self._thread.join()
        self._dressed.close()

    def _run(self) -> None:
        try:
            given = dict(self._call)
            with self._autocast:
                self._pipe(given.pop("prompt"), output_type="latent", **given)
        except _Closed:
            pass
        except BaseException as error:
            self._error = error
        self._at = None
        self._ours.release()

    def _paused(self, step: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(step)
        def paused(model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            result = step(model_output, timestep, sample, *args, **kwargs)
            self._at = At(sample, model_output, result[0])
            self._ours.release()
            self._theirs.acquire()
            if self._closed:
                raise _Closed
            return result if self._next is None else replaced(result, self._next)

        return paused


def twin(pipe: Any, scheduler: Any) -> Any:
    """A pipeline that shares everything with another but its scheduler and its attributes."""
    made = object.__new__(type(pipe))
    vars(made).update(vars(pipe))
    vars(made)["scheduler"] = scheduler
    made.set_progress_bar_config(disable=True)
    return made


def replaced(result: Any, state: torch.Tensor) -> Any:
    """What a scheduler's step gives, a tuple or an output, with other latents in it."""
    if isinstance(result, tuple):
        return (state, *result[1:])
    return type(result)(**{**result, "prev_sample": state})


@contextmanager
def loops(
    pipe: Any, scheduler: Callable[[], Any], calls: Sequence[Mapping[str, Any]], dress: Dress = nullcontext
) -> Iterator[list[Loop]]:
    """Runs for these calls, each with a scheduler made by `scheduler`, `dress`ed; closed at the end."""
    made: list[Loop] = []
    try:
        made += [Loop(pipe, scheduler(), call, dress) for call in calls]
        yield made
    finally:
        for loop in made:
            loop.close()
