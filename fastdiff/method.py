"""The config of a method is the method: a frozen pydantic model whose fields are its settings."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """Frozen, strict about names; what it says never changes while a pipeline runs."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Method(Settings):
    """Base of every registered method; `method` is its name in the registry."""

    method: str
