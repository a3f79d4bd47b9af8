"""What a component that was quantized for good knows of it: to be saved, and to find its bucket without a clock."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from .activations import Present
from .calibration import Origin
from .observe import told_time

STATE = "_fastdiff_quantized"  # where a component keeps it


@dataclass
class Standing:
    """`origin` says at which noise levels the buckets change; None where no range is static."""

    method: dict[str, Any]
    present: Present
    origin: Origin | None = None

    def attach(self, component: nn.Module) -> None:
        """For as long as the component lives: before each call it looks at the time, unless a clock tells it."""
        object.__setattr__(component, STATE, self)
        if self.origin is not None and self.origin.times:
            component.register_forward_pre_hook(self.look, with_kwargs=True)

    def look(self, component: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if not self.present.clocked and self.origin is not None:
            time = told_time(args, kwargs)
            self.present.bucket = None if time is None else self.origin.bucket_at(time)


def standing(component: nn.Module) -> Standing | None:
    """What a component knows of being quantized for good, if it is."""
    found: Standing | None = vars(component).get(STATE)
    return found
