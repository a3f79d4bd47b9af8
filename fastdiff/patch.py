"""Reversible changes to live objects: instance level only, recorded, undone last in first out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .errors import NotReversible

_MISSING = object()
# where accelerate's offload hooks keep the forward they wrap; they take it out and put it back after every call
_HOOKED = "_old_forward"


class PatchSet:
    """Attribute swaps that can be taken back exactly.

    As a context manager it keeps the changes on a clean exit and undoes them on an exception, so that an install is
    all or nothing.
    """

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []
        self._intact: dict[tuple[int, str], tuple[str, Callable[[], bool]]] = {}

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Set `owner.name` on the instance, past any `__setattr__` (nn.Module registers nothing)."""
        before = vars(owner).get(name, _MISSING)
        object.__setattr__(owner, name, value)
        self._undo.append(lambda: _put(owner, name, before))
        self._expect(owner, name, lambda: vars(owner).get(name, _MISSING) is value)

    def wrap_forward(self, module: Any, wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Put `wrapper(forward)` in the place of a module's forward, below any offload hook, present or future."""
        slot = _slot(module)
        before = vars(module).get(slot, _MISSING)
        value = wrapper(current_forward(module))
        object.__setattr__(module, slot, value)

        def found() -> str | None:
            return next((s for s in (_HOOKED, "forward") if vars(module).get(s) is value), None)

        def undo() -> None:
            now = found() or slot
            original = type(module).forward.__get__(module) if before is _MISSING else before
            _put(module, now, original if now == _HOOKED else before)

        self._undo.append(undo)
        self._expect(module, "forward", lambda: found() is not None)

    def call(self, apply: Callable[[], Any], undo: Callable[[], Any]) -> Any:
        """A change that is more than an attribute, with its exact inverse."""
        try:
            result = apply()
        except BaseException:
            undo()  # of as much as was done
            raise
        self._undo.append(undo)
        return result

    def restore(self) -> None:
        """Undo everything. Changes nothing and raises NotReversible if somebody patched on top."""
        self.check()
        self._rollback()

    def check(self) -> None:
        """Raises NotReversible if somebody patched on top."""
        for name, intact in self._intact.values():
            if not intact():
                raise NotReversible(
                    f"{name} was changed after fastdiff patched it; undo that change first, then call restore() again"
                )

    def _expect(self, owner: Any, name: str, intact: Callable[[], bool]) -> None:
        """Only the newest patch of an attribute can be seen from outside."""
        self._intact[id(owner), name] = (f"{type(owner).__name__}.{name}", intact)

    def _rollback(self) -> None:
        self._intact.clear()
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> PatchSet:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._rollback()


def _slot(module: Any) -> str:
    return _HOOKED if _HOOKED in vars(module) else "forward"


def current_forward(module: Any) -> Callable[..., Any]:
    """A module's forward as it is now, below any offload hook."""
    return getattr(module, _slot(module))


def _put(owner: Any, name: str, value: Any) -> None:
    if value is _MISSING:
        object.__delattr__(owner, name)
    else:
        object.__setattr__(owner, name, value)
