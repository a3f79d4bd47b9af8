"""What stands in for a float module for a while, and is saved, moved and refused as that one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


def stand_in(instead: nn.Module, floats: nn.Module, parked: bool = False) -> None:
    """Let `instead` be saved as the float module in whose place it is put, so that a file holds the plain model, and
    move with it, so that what comes back is where the rest went; what is parked takes types alone, and stays where it
    is. Weights cannot be loaded into it."""
    own = instead._apply

    def both(fn: Callable[..., Any], recurse: bool = True) -> nn.Module:
        floats._apply((lambda t: fn(t).to(t.device)) if parked else fn)
        return own(fn, recurse)

    def refuse(state_dict: Any, prefix: str, *lists: Any) -> None:
        if any(key.startswith(prefix) for key in state_dict):
            lists[-1].append(f"{prefix[:-1]} is quantized or pruned by fastdiff.accelerate: restore() first, then load")

    instead._apply = both  # type: ignore[method-assign]
    instead.state_dict = floats.state_dict  # type: ignore[method-assign]
    instead._load_from_state_dict = refuse  # type: ignore[method-assign, assignment]
