"""Where a loop begins and ends in its scheduler's list of timesteps.

Told by the scheduler, by the place in its list of the timestep in use, or by the length of the loop; not by a value,
which a pipeline may scale, and which may stand in the list twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .caller import starts_late


def place(timestep: Any, listed: Any) -> int | None:
    """Where in a list of timesteps one lies that is a view of it, as what a loop over the list is given; else None."""
    if not isinstance(timestep, Tensor) or not isinstance(listed, Tensor) or listed.ndim != 1:
        return None
    if timestep.is_meta or listed.is_meta or not timestep.numel():
        return None
    if timestep.untyped_storage().data_ptr() != listed.untyped_storage().data_ptr():
        return None
    if any(step for step, count in zip(timestep.stride(), timestep.shape, strict=True) if count > 1):
        return None  # several of them in one call
    found = int(timestep.storage_offset() - listed.storage_offset())
    return found if 0 <= found < len(listed) else None


def span(scheduler: Any, listed: Sequence[float], pipe: Any | None, length: int | None, first: Any) -> tuple[int, int]:
    """Begin and end of a loop: img2img begins late, the base of a refiner ends early.

    listed: the scheduler's timesteps as numbers. pipe: the pipeline whose loop it is, None for a loop of one's own.
    length: timesteps that the loop goes through, where that is known. first: the first timestep that was used.
    """
    total = len(listed)
    begin = getattr(scheduler, "begin_index", None)
    if begin is None:
        begin = place(first, getattr(scheduler, "timesteps", None))
    if begin is None and pipe is not None and length is not None and starts_late(pipe):
        begin = total - length
    if begin is None and pipe is None:
        begin = _only_place(listed, first)
    begin = min(max(int(begin or 0), 0), max(total - 1, 0))
    fits = length is not None and 0 < length <= total - begin
    return begin, begin + length if fits and length is not None else total


def _only_place(listed: Sequence[float], first: Any) -> int | None:
    """In a loop of one's own that is given whole numbers, which are no part of a time: the place of one that stands in
    the list once."""
    return listed.index(first) if isinstance(first, int) and listed.count(first) == 1 else None
