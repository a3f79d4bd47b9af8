"""Commands whose options are the fields of dataclasses."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from functools import wraps
from typing import Any, get_type_hints

Command = Callable[..., Any]


def gathered(*groups: Any) -> Callable[[Command], Command]:
    """Turns a command whose first arguments are these dataclasses into one with an option for each of their fields."""
    hints = [get_type_hints(group, include_extras=True) for group in groups]

    def spreading(command: Command) -> Command:
        own = list(inspect.signature(command, eval_str=True).parameters.values())[len(groups) :]

        @wraps(command)
        def spread(**given: Any) -> Any:
            made = [
                group(**{name: given.pop(name) for name in hint}) for group, hint in zip(groups, hints, strict=True)
            ]
            return command(*made, **given)

        shared = [
            inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=hint[f.name])
            for group, hint in zip(groups, hints, strict=True)
            for f in fields(group)
        ]
        parameters = [*shared, *(one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in own)]
        spread.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        spread.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return spread

    return spreading
