"""Everything a pipeline and its parts hold, to tell whether something was left behind."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

_CONTAINERS = (dict, list, set)


def owners(pipe: DiffusionPipeline) -> Iterator[tuple[str, Any]]:
    """The pipeline, its scheduler, all modules and attention processors."""
    yield "pipe", pipe
    yield "scheduler", pipe.scheduler
    for component, module in pipe.components.items():
        if isinstance(module, nn.Module):
            for path, child in module.named_modules():
                yield f"{component}.{path}", child
                if getattr(child, "processor", None) is not None:
                    yield f"{component}.{path}.processor", child.processor


def snapshot(pipe: DiffusionPipeline) -> dict[str, Any]:
    """`vars()` of every owner, containers copied, and the attributes of all their classes."""
    state: dict[str, Any] = {}
    classes: set[type] = set()
    for name, owner in owners(pipe):
        state[name] = {
            key: value.copy() if isinstance(value, _CONTAINERS) else value for key, value in vars(owner).items()
        }
        classes.update(type(owner).__mro__)
    for cls in classes:
        state[f"class {cls.__module__}.{cls.__qualname__}"] = {k: v for k, v in vars(cls).items() if callable(v)}
    return state


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Dotted names of what is not the same; empty if nothing changed."""
    found = [f"{owner} exists only once" for owner in before.keys() ^ after.keys()]
    for owner in before.keys() & after.keys():
        old, new = before[owner], after[owner]
        found += [f"{owner}.{key} exists only once" for key in old.keys() ^ new.keys()]
        found += [f"{owner}.{key} changed" for key in old.keys() & new.keys() if not _same(old[key], new[key])]
    return sorted(found)


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if type(a) is not type(b) or callable(a):
        return False
    if isinstance(a, torch.Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, torch.Generator):
        return True
    return bool((a == b) if not hasattr(a, "all") else (a == b).all())
