"""What a dynamic method decides, for each picture by itself, and what it reads for it inside the denoiser."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

from torch import Tensor, nn

from fastdiff.anatomy import named
from fastdiff.clock import Step
from fastdiff.patch import PatchSet

from .base import Gated
from .reading import Together
from .region import Memory


def wishes(
    method: Gated, step: Step, memories: Sequence[Memory], whole: bool, agree: Callable[[Tensor], Tensor] | None
) -> list[bool]:
    """Whether a step is computed, for each of some memories.

    whole: it is in any case. agree: makes numbers the same on all ranks. The host looks once, at the numbers of all.
    """
    changes, now = Together(), list[Callable[[], float] | None]()
    for memory in memories:
        guarded = method.guarded(False, step.index, step.run.total, memory.cached_in_row, memory.cached)
        if guarded or whole or not memory.probes:
            now.append(None)
            continue
        change = method.change(step, memory)
        memory.drift = change if agree is None else agree(change)
        now.append(changes.add(memory.drift))
    changes.leave()
    found = []
    for memory, present in zip(memories, now, strict=True):
        known = memory.change if method.lagged and memory.change is not None else present
        memory.change = present
        found.append(present is None or known is None or not known() < method.threshold)  # also if no number
    return [True] * len(found) if method.pictures == "strictest" and any(found) else found


def read_probe(
    module: nn.Module, read: Callable[..., Tensor], current: Callable[[], list[Memory] | None], number: int,
    patches: PatchSet,
) -> None:  # fmt: skip
    """Wrap a live module: what `read` makes of its inputs and output is the probe of region `number` in the call."""
    by_name = named(module)

    def wrapper(forward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(forward)
        def probed(*args: Any, **kwargs: Any) -> Any:
            output, memories = forward(*args, **kwargs), current()
            if memories is not None:
                memories[number].probe = read(by_name(args, kwargs), output).detach()
            return output

        return probed

    patches.wrap_forward(module, wrapper)
