"""What a file says of the pictures that it was drawn from and of what was put on its model: names and fingerprints."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastdiff.images import Sampling


def fingerprints(job: Sampling) -> dict[str, str]:
    """What each picture is, by its name without the path."""
    read = {Path(path).name: Path(path).expanduser().read_bytes() for _, path in job.pictures}
    return {name: hashlib.sha256(data).hexdigest()[:16] for name, data in read.items()}


def inputs(job: Sampling) -> dict[str, Any]:
    """A job's inputs as they go into a file: pictures without their paths, which say who and where somebody is."""
    kept = job.model_dump(include={"strength", "frames", "fps"})
    image = [Path(path).name for path in job.image] if job.image else None
    others = {name: path and Path(path).name for name, path in (("mask", job.mask), ("control", job.control))}
    return kept | others | {"image": image, "drawn_from": fingerprints(job)}


def outfit(worn: Mapping[str, Any]) -> dict[str, Any]:
    """What was put on a model, as it goes into a file."""
    kept = {name: worn[name] for name in ("scheduler", "vae_tiling") if worn.get(name)}
    if worn.get("lora"):
        kept["lora"] = [Path(text).name for text in worn["lora"]]
    if worn.get("controlnet"):
        kept["controlnet"] = Path(worn["controlnet"]).name
    return kept
