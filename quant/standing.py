"""What a component that was quantized for good knows of it: to be saved, and to find its bucket without a clock."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fastdiff.errors import UnsupportedModel

from .activations import Present
from .calibration import Origin
from .layer import QLayer
from .observe import told_time

STATE = "_fastdiff_quantized"  # where a component keeps it
_SAVE = "save_pretrained"


@dataclass
class Standing:
    """`origin` says at which noise levels the buckets change; None where no range is static."""

    method: dict[str, Any]
    present: Present
    origin: Origin | None = None

    def attach(self, component: nn.Module) -> None:
        """For as long as the component lives: before each call it looks at the time, unless a clock tells it."""
        object.__setattr__(component, STATE, self)
        object.__setattr__(component, _SAVE, self.refuse)
        component._register_state_dict_hook(_weights_on_demand)
        if self.origin is not None and self.origin.times:
            component.register_forward_pre_hook(self.look, with_kwargs=True)

    def look(self, component: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if not self.present.clocked and self.origin is not None:
            time = told_time(args, kwargs)
            self.present.bucket = None if time is None else self.origin.bucket_at(time)

    def refuse(self, *_: Any, **__: Any) -> None:
        """In the place of `save_pretrained`, which would write integers that no other library reads."""
        raise UnsupportedModel(
            f"this model is quantized for good ({self.method['method']}), and only fastdiff.save(pipe, directory) "
            "writes that; to save floats, load the float model"
        )


@contextmanager
def saving(component: nn.Module) -> Iterator[None]:
    """Lets `save_pretrained` write the stored tensors."""
    refuse = vars(component)[_SAVE]
    object.__delattr__(component, _SAVE)
    try:
        yield
    finally:
        object.__setattr__(component, _SAVE, refuse)


def standing(component: nn.Module) -> Standing | None:
    """What a component knows of being quantized for good, if it is."""
    found: Standing | None = vars(component).get(STATE)
    return found


class _Named(OrderedDict[str, Tensor]):
    """A state dict that has the float weights of quantized layers for who asks by name, and holds none: loaders of
    adapters look up their shapes."""

    root: nn.Module

    def __missing__(self, key: str) -> Tensor:
        path, _, name = key.rpartition(".")
        try:
            layer = self.root.get_submodule(path)
        except AttributeError:
            raise KeyError(key) from None
        layer = getattr(layer, "base_layer", layer)  # below an adapter
        if name != "weight" or not isinstance(layer, QLayer):
            raise KeyError(key)
        return layer.weight


def _weights_on_demand(root: nn.Module, found: Any, prefix: str, metadata: Any) -> Any:
    named = _Named(found)
    named.root, named._metadata = root, found._metadata  # type: ignore[attr-defined]
    return named
