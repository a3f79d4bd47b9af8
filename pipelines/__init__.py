"""Everything that knows diffusers: accelerating, loading, model families, solvers."""

from importlib import import_module
from typing import Any

__all__ = ["Family", "register_family"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module(".families", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
