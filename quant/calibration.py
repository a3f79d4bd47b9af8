"""What a calibration found, as a file: safetensors with a description of what it was made on."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fastdiff.clock import Run
from fastdiff.errors import BadConfig, BadModel
from fastdiff.method import Settings

from .packing import Tensors


class Origin(Settings):
    """What a calibration was made on, and the options it depends on."""

    version: int = Field(1, ge=1, le=1)
    components: dict[str, str] = Field(description="class and configuration of each component, by name")
    edges: tuple[float, ...] = Field((), description="noise shares, falling, at which the next bucket begins")
    buckets: int = Field(ge=1)
    times: tuple[tuple[float, float], ...] = Field((), description="what denoisers were told of the time, noise share")
    scheduler: str = ""
    steps: int = Field(0, ge=0)
    guidance_scale: float | None = None
    prompts: int = Field(ge=0)
    smooth: float | Literal["percentile"] | None = None
    split: bool = False

    def bucket(self, share: float) -> int:
        """The bucket of a noise share."""
        return bisect_left([-edge for edge in self.edges], -share)

    def bucket_at(self, time: float) -> int | None:
        """The bucket where a denoiser is told this time, on a grid of whatever solver; None if that is not known."""
        if not self.times:
            return None
        told, shares = np.array(sorted(self.times)).T
        return self.bucket(float(np.interp(time, told, shares)))


@dataclass(frozen=True)
class Calibration:
    """Ranges, and what smooths, by component and layer."""

    origin: Origin
    found: Mapping[str, Mapping[str, Tensors]] = field(default_factory=dict)

    def of(self, component: str) -> Mapping[str, Tensors]:
        return self.found.get(component, {})

    def check(self, component: str, fingerprint: str) -> None:
        """Raises BadConfig for a calibration of another model."""
        made = self.origin.components.get(component)
        if made != fingerprint:
            raise BadConfig(
                f"the calibration was made for {made or 'a pipeline without ' + component}, this {component} is "
                f"{fingerprint}; calibrate it with this model"
            )

    def differences(self, run: Run) -> list[str]:
        """What is different in a run from that of the calibration, a sentence each."""
        origin, said = self.origin, []
        if origin.scheduler and run.scheduler and run.scheduler != origin.scheduler:
            said.append(
                f"ranges were calibrated with {origin.scheduler}, this run has {run.scheduler}: they go by the noise"
            )
        return said

    def save(self, path: Path) -> None:
        tensors = {
            f"{c}/{n}/{k}": t for c, layers in self.found.items() for n, ts in layers.items() for k, t in ts.items()
        }
        save_file(
            {k: t.cpu().contiguous() for k, t in tensors.items()}, path, {"fastdiff": self.origin.model_dump_json()}
        )

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Raises BadConfig for a file that is not there or no calibration, BadModel for a broken one."""
        file = Path(path).expanduser()
        if not file.is_file():
            raise BadConfig(
                f"the calibration {str(path)!r} does not exist; make it with fastdiff quantize -o FILE.safetensors"
            )
        try:
            with safe_open(file, framework="pt") as opened:
                described = json.loads((opened.metadata() or {})["fastdiff"])
                tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
            origin = Origin(**described)
        except (KeyError, json.JSONDecodeError, ValidationError, TypeError):
            raise BadConfig(
                f"{str(path)!r} is no calibration of fastdiff; make one with fastdiff quantize -o FILE.safetensors"
            ) from None
        except (SafetensorError, OSError, ValueError) as error:
            raise BadModel(f"{str(path)!r} is truncated or corrupt: {error}; make it again") from None
        found: dict[str, Any] = {}
        for key, tensor in tensors.items():
            component, name, kind = ([*key.split("/"), "", ""])[:3]
            if kind not in ("low", "high", "smooth") or not bool(torch.isfinite(tensor).all()):
                raise BadModel(f"{str(path)!r} holds {key!r}, which is no part of a calibration; make it again")
            found.setdefault(component, {}).setdefault(name, {})[kind] = tensor
        return cls(origin, found)
