"""Reversible changes to live objects: instance level only, recorded, undone last in first out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .errors import NotCopyable, NotReversible

_MISSING = object()
# where accelerate's offload hooks keep the forward they wrap; they take it out and put it back after every call
_HOOKED = "_old_forward"
_REGISTRY = "_diffusers_hook"  # where diffusers keeps the hooks of a module


class PatchSet:
    """Attribute swaps that can be taken back exactly.

    As a context manager it keeps the changes on a clean exit and undoes them on an exception, so that an install is
    all or nothing.
    """

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []
        self._intact: dict[tuple[int, str], tuple[str, Callable[[], bool]]] = {}
        self._wrapped: dict[int, tuple[Any, Callable[[], Any]]] = {}

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Set `owner.name` on the instance, past any `__setattr__` (nn.Module registers nothing)."""
        before = vars(owner).get(name, _MISSING)
        object.__setattr__(owner, name, value)
        self._undo.append(lambda: _put(owner, name, before))
        self._expect(owner, name, lambda: vars(owner).get(name, _MISSING) is value)

    def wrap_forward(self, module: Any, wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Put `wrapper(forward)` in the place of a module's forward, below any offload hook that comes later.

        Below those of accelerate that are there, too, but above those of diffusers' group offloading: what is left out
        is then not loaded.
        """
        owner, name = _slot(module)
        before = vars(owner).get(name, _MISSING)
        value = wrapper(current_forward(module))
        object.__setattr__(owner, name, value)

        def found() -> tuple[Any, str] | None:
            return next((place for place in _places(module) if vars(place[0]).get(place[1]) is value), None)

        def undo() -> None:
            place = found()
            if place is None:
                return  # a hook that was there before was taken off, and the patch with it
            original = type(module).forward.__get__(module) if before is _MISSING else before
            _put(*place, before if place == (module, "forward") else original)

        self._undo.append(undo)
        self._expect(module, "forward", lambda: found() is not None or _bare(module))
        self._wrapped[id(module)] = (module, found)

    def replace(self, parent: Any, name: str, module: Any) -> None:
        """Put a module in the place of a module's child; the very same child comes back."""
        before = parent._modules[name]
        parent._modules[name] = module
        self._undo.append(lambda: parent._modules.__setitem__(name, before))
        said = f"{type(parent).__name__}.{name}"
        self._intact[id(parent), f"child {name}"] = (said, lambda: parent._modules.get(name) is module)

    def lost(self) -> list[str]:
        """Classes of modules whose patch went with a hook that was below it, and that work as unpatched since then."""
        wrapped = self._wrapped.values()
        return sorted({type(module).__name__ for module, found in wrapped if found() is None and _bare(module)})

    def refuse_copies(self, owner: Any) -> None:
        """Pickling or deep-copying `owner` raises NotCopyable: a copy would go on calling the original's patches."""
        name = type(owner).__name__

        def refuse(*_: Any) -> Any:
            raise NotCopyable(
                f"this {name} is accelerated and cannot be pickled or deep-copied: the copy would call the patches of "
                "the original; restore() it first (fastdiff.restore(pipe)), copy, and accelerate the copy"
            )

        for protocol in ("__reduce_ex__", "__deepcopy__"):
            self.set(owner, protocol, refuse)

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
        self._wrapped.clear()
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> PatchSet:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._rollback()


def _slot(module: Any) -> tuple[Any, str]:
    """Where a new patch of a module's forward goes. Group offloading with a stream puts hooks on every module that
    take themselves off after the first call, and what is above them: there it goes below."""
    if _HOOKED in vars(module):
        return module, _HOOKED
    registry = vars(module).get(_REGISTRY)
    groups = [getattr(hook, "group", None) for hook in registry.hooks.values()] if registry is not None else []
    if any(getattr(group, "stream", None) is not None for group in groups):
        first = registry._fn_refs[0]
        return first, "forward" if first.original_forward is None else "original_forward"
    return module, "forward"


def _places(module: Any) -> list[tuple[Any, str]]:
    """Wherever a module's forward may be kept: by itself, and by the hooks of accelerate and diffusers."""
    references = getattr(vars(module).get(_REGISTRY), "_fn_refs", [])
    kept = [(reference, name) for reference in references for name in ("original_forward", "forward")]
    return [(module, _HOOKED), (module, "forward"), *kept]


def _bare(module: Any) -> bool:
    """Whether nothing but hooks of diffusers is above a forward that is the class's own."""
    references = getattr(vars(module).get(_REGISTRY), "_fn_refs", None)
    if references is None:
        return False
    inner = module.forward
    if references:
        closure = getattr(getattr(inner, "func", None), "__closure__", None) or ()
        if not any(cell.cell_contents is references[-1] for cell in closure):
            return False  # somebody else's forward is on top
        inner = references[0].original_forward or references[0].forward
    return getattr(inner, "__func__", None) is type(module).forward


def current_forward(module: Any) -> Callable[..., Any]:
    """A module's forward as it is now, below the hooks that patches go below."""
    return getattr(*_slot(module))


def _put(owner: Any, name: str, value: Any) -> None:
    if value is _MISSING:
        object.__delattr__(owner, name)
    else:
        object.__setattr__(owner, name, value)
