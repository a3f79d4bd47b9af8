"""Settings that may name a JSON file where they want what is in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BeforeValidator, ValidationError

from fastdiff.method import Settings, read_json

_LARGEST = 1 << 28  # bytes


def from_file(kind: type[Settings], what: str, hint: str) -> BeforeValidator:
    """Raises ValueError, in one sentence, for a file that is missing, broken, or no `what`."""

    def read(value: Any) -> Any:
        if not isinstance(value, str | Path):
            return value
        path = Path(value).expanduser()
        name = f"{what} {str(path)!r}"
        values = read_json(path, name, what, hint, _LARGEST)
        try:
            return kind.model_validate(values)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ValueError(f"{name} is damaged: {where}: {first['msg'].lower()}") from None

    return BeforeValidator(read)
