"""A plan for each denoiser of a pipeline that has several."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Generic, TypeVar

from pydantic import ConfigDict, RootModel

from .method import Settings

P = TypeVar("P", bound=Settings)


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
