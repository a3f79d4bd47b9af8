"""Settings that may name a JSON file where they want what is in it: a plan, or one for each denoiser of a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import BeforeValidator, ConfigDict, RootModel, ValidationError

from .method import Settings, read_json

P = TypeVar("P", bound=Settings)
_FOUND = {"missing": "missing", "extra_forbidden": "unknown to it"}


class Each(RootModel[dict[str, P]], Generic[P]):
    """A plan for each denoiser, by the name of the component."""

    model_config = ConfigDict(frozen=True)

    def summary(self) -> str:
        plans: Mapping[str, Any] = self.root
        return "; ".join(f"{name} {plan.summary()}" for name, plan in plans.items())


def own(plan: P | Each[P] | None, component: str, main: bool) -> P | None:
    """The plan for a component: a single plan is for the main denoiser alone."""
    if isinstance(plan, Each):
        return plan.root.get(component)
    return plan if main else None


def is_several(values: Any) -> bool:
    """Whether what a file or a config holds is a plan for each component, and not one plan."""
    parts = values.values() if isinstance(values, Mapping) else ()
    return bool(parts) and all(isinstance(part, Mapping | Settings) for part in parts)


def from_file(
    kind: type[P], what: str, hint: str, check: Callable[[Any, str], None] = lambda *_: None, largest: int = 1 << 28
) -> BeforeValidator:
    """Takes a plan, its values, or the path of a file of them; or those of several by component. check: raises
    ValueError, with the name it is given, for values that are no such plan at all. largest: bytes of a file.

    Raises ValueError, in one sentence, for a file that is missing, broken, or no `what`.
    """

    def made(values: Any, name: str, part: str = "") -> P:
        check(values, name)
        try:
            return kind.model_validate(values)
        except ValidationError as error:
            raise ValueError(f"{name} {_wrong(error, part)}") from None

    def read(value: Any) -> Any:
        name = what
        if isinstance(value, str | Path):
            path = Path(value).expanduser()
            name = f"{what} {str(path)!r}"
            value = read_json(path, name, what, hint, largest)
        elif not isinstance(value, Mapping):
            return value
        if not is_several(value):
            return made(value, name)
        return Each[kind]({part: made(plan, name, f"{part}.") for part, plan in value.items()})  # type: ignore[valid-type]

    return BeforeValidator(read)


def _wrong(error: ValidationError, part: str) -> str:
    first = error.errors(include_url=False)[0]
    where = part + ".".join(str(place) for place in first["loc"])
    if first["type"] in _FOUND:
        return f"was made for another method: {where} is {_FOUND[first['type']]}"
    return "is damaged: " + (
        str(first["ctx"]["error"]) if first["type"] == "value_error" else f"{where}: {first['msg'].lower()}"
    )
