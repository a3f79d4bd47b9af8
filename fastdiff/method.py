"""The config of a method is the method: a frozen pydantic model whose fields are its settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator


class Settings(BaseModel):
    """Frozen, strict about names; what it says never changes while a pipeline runs."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_value_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and "bool" not in str(cls.model_fields[str(info.field_name)].annotation):
            raise ValueError(f"{info.field_name} = {value} is not allowed: true and false are no values for it")
        return value


class Method(Settings):
    """Base of every registered method; `method` is its name in the registry."""

    method: str


def read_json(path: Path, name: str, kind: str, hint: str, largest: int) -> Any:
    """What a JSON file holds that a setting names. Raises ValueError, in one sentence that calls it `name`, for a file
    that is missing, has more bytes than any `kind` has, or is truncated."""
    if not path.is_file():
        raise ValueError(f"{name} does not exist; {hint}")
    if path.stat().st_size > largest:
        raise ValueError(f"{name} has {path.stat().st_size} bytes, more than any {kind}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{name} is truncated or no JSON: {error}") from None
