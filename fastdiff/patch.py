"""Reversible changes to live objects: instance level only, recorded, undone last in first out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .errors import NotReversible

_MISSING = object()


class PatchSet:
    """Attribute swaps that can be taken back exactly.

    As a context manager it keeps the changes on a clean exit and undoes them on an exception, so that an install is
    all or nothing.
    """

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []
        self._checks: list[tuple[Any, str, Any]] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Set `owner.name` on the instance, past any `__setattr__` (nn.Module registers nothing)."""
        before = vars(owner).get(name, _MISSING)

        def undo() -> None:
            if before is _MISSING:
                object.__delattr__(owner, name)
            else:
                object.__setattr__(owner, name, before)

        object.__setattr__(owner, name, value)
        self._undo.append(undo)
        self._checks.append((owner, name, value))

    def call(self, apply: Callable[[], Any], undo: Callable[[], Any]) -> Any:
        """A change that is more than an attribute, with its exact inverse."""
        result = apply()
        self._undo.append(undo)
        return result

    def restore(self) -> None:
        """Undo everything. Changes nothing and raises NotReversible if somebody patched on top."""
        newest: dict[tuple[int, str], tuple[Any, str, Any]] = {}
        for owner, name, value in self._checks:
            newest[id(owner), name] = (owner, name, value)
        for owner, name, value in newest.values():
            if vars(owner).get(name, _MISSING) is not value:
                raise NotReversible(
                    f"{type(owner).__name__}.{name} was changed after fastdiff patched it; undo that change first "
                    "(for example pipe.remove_all_hooks()), then call restore() again"
                )
        self._rollback()

    def _rollback(self) -> None:
        self._checks.clear()
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> PatchSet:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._rollback()
