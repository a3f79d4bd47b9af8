"""Everything that knows diffusers: accelerating, loading, model families."""

from fastdiff.anatomy import Family

from .families import register_family

__all__ = ["Family", "register_family"]
