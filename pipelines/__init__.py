"""Everything that knows diffusers: accelerating, loading, model families, solvers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastdiff.anatomy import Family

    from .families import register_family

__all__ = ["Family", "register_family"]


def __getattr__(name: str) -> Any:
    """Lazy (PEP 562): the names of solvers are asked for without torch."""
    if name == "Family":
        from fastdiff.anatomy import Family

        return Family
    if name == "register_family":
        from .families import register_family

        return register_family
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
