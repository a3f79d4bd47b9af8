"""Input fields for the settings of any method, made from its schema; and back to settings."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import gradio as gr
from pydantic import BaseModel

from fastdiff.caching.predictors import PREDICTORS

UNSET = ""  # what stands for None where a list has to show something


@dataclass(frozen=True)
class Setting:
    """One setting: how it is entered (flag, choice, range, number or text) and what the schema says of it."""

    name: str
    entry: str
    value: Any
    info: str
    choices: tuple[Any, ...] = ()
    low: float | None = None
    high: float | None = None
    whole: bool = False
    optional: bool = False

    @property
    def label(self) -> str:
        return self.name.replace("_", " ").capitalize()

    def component(self, section: str, key: str) -> Any:
        shared: dict[str, Any] = {
            "label": self.label,
            "info": self.info or None,
            "key": key,
            "elem_id": f"{section}-{self.name}",
        }
        shared |= {"interactive": True, "min_width": 210}
        if self.entry == "flag":
            return gr.Checkbox(bool(self.value), **shared)
        if self.entry == "choice":
            empty = [("as it is", UNSET)] if self.optional else []
            named = [(str(choice), choice) for choice in self.choices]
            return gr.Dropdown([*empty, *named], value=UNSET if self.value is None else self.value, **shared)
        if self.entry == "range":
            step = 1 if self.whole else round((self.high or 1) - (self.low or 0), 6) / 100
            return gr.Slider(self.low or 0, self.high or 1, self.value, step=step, **shared)
        if self.entry == "number":
            return gr.Number(self.value, step=1 if self.whole else 0.01, **shared)
        text = "" if self.value is None else self.value if isinstance(self.value, str) else json.dumps(self.value)
        return gr.Textbox(text, max_lines=3, **shared)

    def parsed(self, raw: Any) -> Any:
        """What was entered, as the config wants it; whether it is allowed is for the config to say."""
        if raw is None or (isinstance(raw, str) and raw.strip() == UNSET):
            return None
        if self.entry in ("number", "range") and isinstance(raw, float) and self.whole and raw.is_integer():
            return int(raw)
        if self.entry != "text" or not isinstance(raw, str):
            return raw
        try:
            return json.loads(raw)
        except (ValueError, RecursionError):
            return raw


def settings_of(model: type[BaseModel], values: Mapping[str, Any], leave_out: Collection[str] = ()) -> list[Setting]:
    """A setting for each field that leaves a choice, with the values it has now."""
    schema = model.model_json_schema()
    found = []
    for name, spec in schema.get("properties", {}).items():
        kinds = spec.get("anyOf", [spec])
        real = [kind for kind in kinds if kind.get("type") != "null"]
        kind = real[0] if len(real) == 1 else {}
        if name not in leave_out and "const" not in kind:
            optional = len(real) < len(kinds)
            found.append(_setting(name, kind, values.get(name), spec.get("description", ""), optional))
    return found


def _setting(name: str, kind: Mapping[str, Any], value: Any, description: str, optional: bool) -> Setting:
    low = kind.get("minimum", kind.get("exclusiveMinimum"))
    high = kind.get("maximum", kind.get("exclusiveMaximum"))
    whole = kind.get("type") == "integer"
    bounds = {"low": low, "high": high, "whole": whole, "optional": optional}
    choices = tuple(PREDICTORS) if name == "predictor" else tuple(kind.get("enum", ()))
    if kind.get("type") == "boolean":
        choices = (True, False) if optional else ()
        entry = "choice" if optional else "flag"
    elif choices:
        entry = "choice"
    elif kind.get("type") in ("integer", "number"):
        entry = "number" if optional or low is None or high is None or value is None else "range"
    else:
        entry = "text"
    notes = [description, _range(kind), "empty: off" if optional and entry != "choice" else ""]
    return Setting(name, entry, value, "; ".join(note for note in notes if note), choices, **bounds)


def _range(kind: Mapping[str, Any]) -> str:
    words = {
        "minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below",
    }  # fmt: skip
    return ", ".join(f"{word} {kind[key]}" for key, word in words.items() if key in kind)
