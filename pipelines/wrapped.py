"""What others put around a denoiser: wrappers that hand its calls on, and graphs that were made before ours."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastdiff.errors import UnsupportedModel

_GRAPH = "_compiled_call_impl"  # where nn.Module.compile() keeps what it made


def bare(module: nn.Module) -> nn.Module:
    """The model inside all wrappers."""
    return _layers(module)[-1]


def unwrapped(name: str, module: nn.Module) -> nn.Module:
    """The model that is patched: the one inside wrappers whose own calls end in its forward.

    Raises UnsupportedModel, with what to do, for one inside a graph: patches would become a part of the graph.
    """
    layers = _layers(module)
    if any(_is(layer, "OptimizedModule") for layer in layers):
        raise _compiled(name, f"set pipe.{name} = pipe.{name}._orig_mod")
    if any(vars(layer).get(_GRAPH) is not None for layer in layers):
        raise _compiled(name, f"set pipe.{name}.{_GRAPH} = None")
    return layers[-1]


def _layers(module: nn.Module) -> list[nn.Module]:
    """A module and what is inside of it, wrapper after wrapper."""
    outer: Any = module
    if _is(module, "OptimizedModule"):
        inner = outer._orig_mod
    elif _is(module, "PeftModel"):
        inner = outer.get_base_model()
    elif isinstance(module, DistributedDataParallel):
        inner = outer.module
    else:
        return [module]
    return [module, *_layers(inner)]


def _is(module: nn.Module, class_name: str) -> bool:
    """By name: torch keeps the one class to itself, the other's library may not be installed."""
    return any(cls.__name__ == class_name for cls in type(module).__mro__)


def refuse_compiled(name: str, denoiser: nn.Module, touched: Iterable[nn.Module]) -> None:
    """Raises UnsupportedModel where a module that is to be patched is inside a graph that nn.Module.compile made."""
    graphs = [(path, module) for path, module in denoiser.named_modules() if vars(module).get(_GRAPH) is not None]
    wanted = {id(module) for module in touched} if graphs else set()
    for path, module in graphs:
        if any(id(part) in wanted for part in module.modules()):
            raise _compiled(f"{name}.{path}", f"set {_GRAPH} = None on all such blocks")


def _compiled(name: str, undo: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"{name} was compiled before fastdiff saw it, and what fastdiff patches would be caught in that graph: {undo}, "
        "and let fastdiff compile it (accelerate(..., compile=True))"
    )
