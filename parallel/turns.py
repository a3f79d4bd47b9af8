"""Two computations of one rank that take turns: where one would wait for other ranks, the other goes on.

Source: TokenWeave, https://arxiv.org/abs/2505.11329, whose two parts of a batch hide each other's all-reduce. Which of
them computes is decided by the places at which they wait alone, so that all ranks send in the same order.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Turns:
    """`part` is the one that has the turn, 0 or 1; each has a thread and a call stack of its own."""

    def __init__(self) -> None:
        self.part = 0
        self._both = False  # whether there is another to go on
        self._error: BaseException | None = None
        self._go: list[threading.Semaphore] = []

    def hand_over(self) -> None:
        """About to wait: the other part goes on until it waits, too. Raises what ended the other."""
        if not self._both:
            return
        own = self.part
        self._pass(1 - own)
        self._go[own].acquire()
        if self._error is not None:
            raise self._error

    def _pass(self, part: int) -> None:
        self.part = part
        self._go[part].release()

    def run(self, first: Callable[[], Any], second: Callable[[], Any]) -> tuple[Any, Any]:
        """What both return. The first begins; where one raises, the other ends at its next turn, with the same."""
        self._go = [threading.Semaphore(0), threading.Semaphore(0)]
        found: list[Any] = []
        where, settings = contextvars.copy_context(), _settings()

        def other() -> None:
            self._go[1].acquire()
            try:
                if self._error is None:
                    with settings():
                        found.append(where.run(second))
            except BaseException as error:
                self._error = error
            finally:
                self._both = False
                self._pass(0)

        thread = threading.Thread(target=other, name="the other part of a batch", daemon=True)
        self._both = True
        thread.start()
        own = None
        try:
            own = first()
        except BaseException as error:
            self._error = error
        if self._both:  # the other is not at its end
            self._both = False
            self._pass(1)
        thread.join()
        ended, self._error, self.part = self._error, None, 0
        if ended is not None:
            raise ended
        return own, found[0]


def _settings() -> Callable[[], Any]:
    """What torch knows of this thread, for another: gradients, autocast, and the stream of an accelerator."""
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = "cpu" if kind is None else kind.type
    cast, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    stream = None if kind is None else torch.accelerator.current_stream()

    @contextmanager
    def entered() -> Iterator[None]:
        if stream is not None:
            torch.accelerator.set_stream(stream)
        with torch.inference_mode(inference), torch.set_grad_enabled(grad), torch.autocast(device, dtype, cast):
            yield

    return entered
