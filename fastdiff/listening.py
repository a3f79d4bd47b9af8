"""Hearing a scheduler: its calls are told to listeners, wherever its state comes from and goes to.

What listens is the object's class, exchanged for a subclass that differs in nothing else. Nothing is put into the
object, so that its state may be copied and put back (MultiDiffusion), and a copy knows that it is one.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from functools import partial, wraps
from types import MethodType
from typing import Any

Heard = Callable[..., Any]  # (scheduler, name, method, *args, **kwargs) -> what the method returns

_NAMES = ("set_timesteps", "step", "scale_model_input", "check_block_should_continue")
EARS = "_fastdiff_ears"
_BASE = "_fastdiff_base"


def listen(scheduler: Any, heard: Heard) -> None:
    """From now on `heard` makes the scheduler's calls, and those of its copies."""
    if not hasattr(type(scheduler), EARS):
        become(scheduler, _listening(type(scheduler)))
        for name in _NAMES:
            if callable(own := vars(scheduler).get(name)):  # somebody's wrapper lies above the class
                vars(scheduler)[name] = _told_own(scheduler, name, own)
    getattr(type(scheduler), EARS).append(heard)


def unlisten(scheduler: Any, heard: Heard) -> None:
    """The inverse of `listen`; with the last listener the object is what it was. Copies are told nothing any more."""
    ears = getattr(type(scheduler), EARS, None)
    if ears is None or heard not in ears:
        return
    ears.remove(heard)
    if ears:
        return
    for name in _NAMES:
        if (own := getattr(vars(scheduler).get(name), _BASE, None)) is not None:
            vars(scheduler)[name] = own
    become(scheduler, getattr(type(scheduler), _BASE))


def unheard(scheduler: Any) -> Any:
    """A deep copy of a scheduler that nobody listens to."""
    made = copy.deepcopy(scheduler)
    base = getattr(type(made), _BASE, None)
    if base is not None:
        become(made, base)
    return made


def become(scheduler: Any, kind: type) -> None:
    object.__dict__["__class__"].__set__(scheduler, kind)  # past the property of `_listening`


def _listening(base: type) -> type:
    """A subclass of `base`, of one object and its copies, that looks like it."""
    ears: list[Heard] = []
    body: dict[str, Any] = {
        name: getattr(base, name)  # bound to the base, so that from_config makes plain schedulers
        for name in dir(base)
        if isinstance(inspect.getattr_static(base, name), classmethod) and not name.startswith("__")
    }
    body |= {name: _told(name, getattr(base, name), ears) for name in _NAMES if hasattr(base, name)}
    body |= {
        EARS: ears, _BASE: base, "__class__": property(lambda self: base), "__doc__": base.__doc__,
        "__module__": base.__module__, "__qualname__": base.__qualname__,
        "__copy__": _copied, "__deepcopy__": deeply_copied, "__reduce_ex__": _pickled,
    }  # fmt: skip
    return same(base)(base.__name__, (base,), body)


def same(base: type) -> type:
    """The metaclass of classes that are equal to `base`: some pipelines ask for the very type."""
    body = {"__eq__": lambda kind, other: other is kind or base == other, "__hash__": lambda kind: hash(base)}
    return type("_Same", (type(base),), body)


def _told(name: str, plain: Callable[..., Any], ears: list[Heard]) -> Callable[..., Any]:
    """A method that keeps its signature, which pipelines read to see whether sigmas or a generator are taken."""

    @wraps(plain)
    def told(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _heard(ears, self, name, MethodType(plain, self))(*args, **kwargs)

    return told


def _told_own(scheduler: Any, name: str, own: Callable[..., Any]) -> Callable[..., Any]:
    """The same for a method that was set on the object itself."""
    ears = getattr(type(scheduler), EARS)

    @wraps(own)
    def told(*args: Any, **kwargs: Any) -> Any:
        return _heard(ears, scheduler, name, own)(*args, **kwargs)

    vars(told)[_BASE] = own
    return told


def _heard(ears: list[Heard], scheduler: Any, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    for heard in ears:
        method = partial(heard, scheduler, name, method)
    return method


def _copied(self: Any) -> Any:
    made = object.__new__(type(self))
    vars(made).update(vars(self))
    return made


def deeply_copied(self: Any, memo: dict[int, Any]) -> Any:
    made = memo[id(self)] = object.__new__(type(self))
    vars(made).update(copy.deepcopy(vars(self), memo))
    return made


def _pickled(self: Any, protocol: Any) -> Any:
    """As an object of the base: another process has nobody who listens."""
    base = getattr(type(self), _BASE)
    return base.__reduce_ex__(self, protocol) if "__reduce_ex__" in vars(base) else (blank, (base,), vars(self))


def blank(kind: type) -> Any:
    return object.__new__(kind)
