"""The layers of config that a command line names, weakest first."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fastdiff.anatomy import Family
from fastdiff.config import Layer, Resolved, layers_of, parse_set, resolve
from fastdiff.errors import BadConfig
from fastdiff.images import Replay
from fastdiff.registry import registry


def layers(
    preset: str | None,
    config: Path | None,
    made: Replay | None,
    image: Path | None,
    sets: Sequence[str],
    devices: int | None,
) -> list[Layer]:
    """--preset or --config replaces the config of the PNG; --set and --devices change single values of either."""
    if preset is not None and config is not None:
        raise BadConfig(f"--preset {preset} and --config {config} exclude each other; a file may name its own preset")
    if preset is not None or config is not None:
        found = layers_of(preset if preset is not None else config)
    else:
        found = [(f"image {image.name}", made.config)] if made and image else []
    found = [*found, *((f"--set {text}", parse_set(text)) for text in sets)]
    return found + _devices(devices, found)


def _devices(devices: int | None, below: Sequence[Layer]) -> list[Layer]:
    if devices is None:
        return []
    if devices < 1:
        raise BadConfig(f"--devices {devices}: give 1 or more")
    asked = any(values.get("parallel") for _, values in below)
    if devices > 1 and not asked:
        known = ", ".join(registry("parallel"))
        raise BadConfig(f"--devices {devices} needs --set parallel.method=NAME, one of {known}")
    return [("--devices", {"parallel": {"devices": devices}})] if asked else []


def timeout(found: Sequence[Layer]) -> float:
    """Seconds that ranks wait for each other, as far as the layers say."""
    said = [values["parallel"].get("timeout") for _, values in found if isinstance(values.get("parallel"), dict)]
    return float(next((value for value in reversed(said) if value is not None), 60.0))


def early(found: Sequence[Layer], family: Family | None, model: str) -> Resolved | None:
    """Resolve before the model is loaded, so that a mistake costs no waiting; None if it takes the model to know."""
    if family is None and any("family" in values for _, values in found):
        return None
    return resolve(found, family, model)
