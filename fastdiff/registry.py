"""Names of methods: one table a room, entry points of other packages, and run-time registration."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from importlib.metadata import entry_points

from .errors import BadConfig, UnknownName, UnsupportedModel

ROOMS = {"cache": "caching", "parallel": "parallel", "quant": "quant", "solver": "pipelines.solving"}


class Registry(Mapping[str, type]):
    """Method classes of one room by name, imported when first asked for.

    The room's own table is `METHODS`; packages add to it with an entry point in the group `fastdiff.<kind>`,
    programs with `register`. `refused` has the reason why a method that people may look for is not there.
    """

    def __init__(self, kind: str, table: Mapping[str, str | type], refused: Mapping[str, str] | None = None) -> None:
        self.kind = kind
        self.refused = dict(refused or {})
        self._table: dict[str, str | type] = dict(table)
        for point in entry_points(group=f"fastdiff.{kind}"):
            if point.name in self._table:
                raise BadConfig(f"{point.value} registers the {kind} method {point.name!r}, which exists already")
            self._table[point.name] = point.value

    def __getitem__(self, name: str) -> type:
        if name in self.refused and name not in self._table:
            raise UnsupportedModel(self.refused[name])
        if name not in self._table:
            raise UnknownName(f"{self.kind} method", name, self._table)
        found = self._table[name]
        if isinstance(found, str):
            module, _, attribute = found.partition(":")
            found = self._table[name] = getattr(importlib.import_module(module), attribute)
        return found

    def __contains__(self, name: object) -> bool:
        return name in self._table

    def __iter__(self) -> Iterator[str]:
        return iter(self._table)

    def __len__(self) -> int:
        return len(self._table)

    def register(self, cls: type) -> type:
        """Add a method class under the default of its `method` field; usable as a decorator."""
        name = cls.model_fields["method"].default  # type: ignore[attr-defined]
        if name in self._table:
            raise BadConfig(f"a {self.kind} method named {name!r} exists already")
        self._table[name] = cls
        return cls


def registry(kind: str) -> Registry:
    """The registry that a room owns as `REGISTRY`; kind is cache, parallel, quant or solver."""
    if kind not in ROOMS:
        raise UnknownName("kind of method", kind, ROOMS)
    return importlib.import_module(f"fastdiff.{ROOMS[kind]}").REGISTRY


def names() -> dict[str, list[str]]:
    """Names of all methods by kind; imports no method."""
    return {kind: list(registry(kind)) for kind in ROOMS}
