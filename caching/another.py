"""A setting that is another model: a live module, or where it lies."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, PlainSerializer, WithJsonSchema
from torch import nn


def _model(value: Any) -> Any:
    if not isinstance(value, nn.Module) and not (value and isinstance(value, str)):
        raise ValueError("give a model, or the directory of one")
    return value


def _named(model: Any) -> str:
    return f"<a live {type(model).__name__}>" if isinstance(model, nn.Module) else str(model)


AnotherModel = Annotated[
    Any, AfterValidator(_model), PlainSerializer(_named, when_used="json"), WithJsonSchema({"type": "string"})
]
