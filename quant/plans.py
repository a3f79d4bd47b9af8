"""Settings that may name a JSON file where they want what is in it: a plan, or one for each denoiser of a pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BeforeValidator, ValidationError

from fastdiff.method import Settings, read_json
from fastdiff.plans import Each, is_several

_LARGEST = 1 << 28  # bytes


def from_file(kind: type[Settings], what: str, hint: str) -> BeforeValidator:
    """Takes a plan, its values, or the path of a file of them; or those of several by component.

    Raises ValueError, in one sentence, for a file that is missing, broken, or no `what`.
    """
    several: Any = Each[kind]  # type: ignore[valid-type]

    def read(value: Any) -> Any:
        name = what
        if isinstance(value, str | Path):
            path = Path(value).expanduser()
            name = f"{what} {str(path)!r}"
            value = read_json(path, name, what, hint, _LARGEST)
        elif not isinstance(value, Mapping):
            return value
        try:
            return (several if is_several(value) else kind).model_validate(value)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ValueError(f"{name} is damaged: {where}: {first['msg'].lower()}") from None

    return BeforeValidator(read)
