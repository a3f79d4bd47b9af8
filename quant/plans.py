"""Settings that may name a JSON file where they want what is in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BeforeValidator, ValidationError

from fastdiff.method import Settings

_LARGEST = 1 << 28  # bytes


def from_file(kind: type[Settings], what: str, hint: str) -> BeforeValidator:
    """Raises ValueError, in one sentence, for a file that is missing, broken, or no `what`."""

    def read(value: Any) -> Any:
        if not isinstance(value, str | Path):
            return value
        path = Path(value).expanduser()
        name = f"{what} {str(path)!r}"
        if not path.is_file():
            raise ValueError(f"{name} does not exist; {hint}")
        if path.stat().st_size > _LARGEST:
            raise ValueError(f"{name} has {path.stat().st_size} bytes, more than any {what}")
        try:
            return kind.model_validate(json.loads(path.read_text(encoding="utf-8")))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ValueError(f"{name} is damaged: {where}: {first['msg'].lower()}") from None
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{name} is truncated or no JSON: {error}") from None

    return BeforeValidator(read)
