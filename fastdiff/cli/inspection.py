"""`inspect`: what a model can use, how a PNG was made, what a config resolves to."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fastdiff.anatomy import Anatomy
from fastdiff.config import Layer, Resolved, layers_of, parse_set, presets, resolve
from fastdiff.errors import BadConfig, FastdiffError
from fastdiff.media import ALL, read
from fastdiff.patch import PatchSet
from fastdiff.registry import registry
from fastdiff.studio.console import print_table, say

_WIDEST = 40  # characters of a value in the table; a plan has thousands, which --json shows


def inspect(subject: str, model: str | None, sets: Sequence[str], as_json: bool) -> None:
    is_image = subject.lower().endswith(ALL)
    is_config = subject in presets() or subject.endswith((".toml", ".json"))
    if is_image:
        made = read(Path(subject))
        found = made.model_dump(mode="json")
        layers: list[Layer] = [(f"image {Path(subject).name}", found.pop("config"))]
    elif is_config:
        found, layers = {}, layers_of(subject)
    else:
        if model is not None or sets:
            raise BadConfig(f"{subject!r} is read as a model; -m and --set belong to a config, a preset or a PNG")
        _show_model(subject, as_json)
        return
    layers = [*layers, *((f"--set {text}", parse_set(text)) for text in sets)]
    resolved = _resolve(layers, model)
    found |= {"config": resolved.config.model_dump(mode="json"), "origins": dict(resolved.origins)}
    if as_json:
        print(json.dumps(found))
        return
    if is_image:
        print_table(_rows(found, leave_out=("config", "origins")), "image", "value")
        print()
    print_table(_origins(resolved), "setting", "value", "origin")
    if model is None and any("family" in values for _, values in layers):
        say("some settings depend on the model; add -m MODEL to see what it gets")


def _resolve(layers: Sequence[Layer], model: str | None) -> Resolved:
    if model is None:
        return resolve(layers)
    from fastdiff.pipelines.families import anatomies
    from fastdiff.studio.drawing import described, opened

    family = described(model)
    if family is None:
        family = anatomies(opened(model))[0].family
    return resolve(layers, family, model)


def _rows(found: Mapping[str, Any], leave_out: Sequence[str] = ()) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for key, value in found.items():
        if key in leave_out or value is None:
            continue
        if key == "report":
            value = {k: v for k, v in value.items() if k != "branches"}
        if isinstance(value, dict):
            value = ", ".join(f"{k} {v}" for k, v in value.items())
        rows.append((key, str(value)))
    return rows


def _origins(resolved: Resolved) -> list[tuple[str, ...]]:
    """Each value of the config with the layer that set it."""
    rows: list[tuple[str, ...]] = []
    for section, table in resolved.config.model_dump(mode="json").items():
        if table is None:
            rows.append((section, "off", resolved.origins.get(section, "default")))
            continue
        for key, value in table.items():
            origin = resolved.origins.get(f"{section}.{key}", resolved.origins.get(section, "default"))
            text = json.dumps(value)
            shown = text if len(text) <= _WIDEST else f"{text[:_WIDEST]}..."
            rows.append((f"{section}.{key}", shown, origin))
    return rows


def _show_model(model: str, as_json: bool) -> None:
    from fastdiff.pipelines.families import anatomies
    from fastdiff.studio.drawing import opened

    pipe = opened(model)
    modules = [m for m in pipe.components.values() if hasattr(m, "parameters")]
    denoisers = [_describe(anatomy) for anatomy in anatomies(pipe)]
    found = {
        "model": model,
        "pipeline": type(pipe).__name__,
        "scheduler": type(pipe.scheduler).__name__,
        "parameters": sum(_size(m) for m in modules),
    }
    if as_json:
        print(json.dumps(found | {"denoisers": denoisers}))
        return
    rows = _rows(found)
    for facts in denoisers:
        rows += _rows(facts, leave_out=("methods", "backends"))
        rows += [(name, f"no: {reason}" if reason else "yes") for name, reason in facts["methods"].items()]
        usable = [name for name, reason in facts["backends"].items() if not reason]
        rows.append(("attention", f"{', '.join(usable) or 'none'} (--json says why not the others)"))
    print_table(rows, "what", "found")


def _size(module: Any) -> int:
    return sum(p.numel() for p in module.parameters())


def _describe(anatomy: Anatomy) -> dict[str, Any]:
    return {
        "component": anatomy.component,
        "class": type(anatomy.denoiser).__name__,
        "family": anatomy.family.name,
        "recognised": anatomy.recognised,
        "size": _size(anatomy.denoiser),
        "methods": {name: _refusal(name, anatomy) for name in registry("cache")},
        "backends": _backends(anatomy),
    }


def _refusal(name: str, anatomy: Anatomy) -> str | None:
    """Why a cache method with its defaults cannot work here; None if it can."""
    try:
        method = registry("cache")[name]()
        method.regions(anatomy)
    except ValidationError as error:
        return "needs " + ", ".join(str(item["loc"][0]) for item in error.errors() if item["loc"])
    except FastdiffError as error:
        return str(error)
    return None


def _backends(anatomy: Anatomy) -> dict[str, str | None]:
    """Each attention backend, with the reason if it does not run here. Nothing is downloaded to find out."""
    from fastdiff.pipelines.attention import backends, install_backend

    found: dict[str, str | None] = {}
    for name in backends():
        if "hub" in name:
            found[name] = "not tried, it downloads a kernel"
            continue
        patches = PatchSet()
        try:
            install_backend(anatomy.denoiser, name, patches)
            patches.restore()
            found[name] = None
        except FastdiffError as error:
            found[name] = str(error)
    return found
