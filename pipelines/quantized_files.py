"""A quantized pipeline as a directory: the stock layout, integers in the safetensors files, and one JSON more."""

from __future__ import annotations

import json
import shutil
import tempfile
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from fastdiff.errors import BadConfig, FastdiffError, UnsupportedModel
from fastdiff.quant.install import QuantReport
from fastdiff.quant.layer import QLayer
from fastdiff.quant.standing import saving, standing
from fastdiff.weights import require

from .quantized_parts import INDEX, structure
from .wrapped import bare

REPORT = "fastdiff_quant_report.json"


def save(pipe: Any, directory: str | Path, report: QuantReport | None = None) -> Path:
    """Write a pipeline that `quantize` made; `fastdiff.load` reads it. Complete or absent; never over something.
    `report` is what `quantize` gave, to be written with it.

    Raises UnsupportedModel for a pipeline that holds no quantized component, or what no file of it can hold (adapters),
    BadConfig for a directory that exists.
    """
    target = Path(directory).expanduser()
    modules = {name: bare(part) for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    parts = {name: part for name, part in modules.items() if standing(part)}
    if not parts:
        raise UnsupportedModel(f"this {type(pipe).__name__} is not quantized for good; call fastdiff.quantize first")
    for name, module in modules.items():
        _check_own(name, module)
    check_target(target)
    folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    try:
        with ExitStack() as stack:
            for part in parts.values():
                stack.enter_context(saving(part))
            pipe.save_pretrained(folder, safe_serialization=True)
        index = {"version": 1, "components": {name: _described(part) for name, part in parts.items()}}
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
        if report is not None:
            (folder / REPORT).write_text(json.dumps(report.to_dict(), indent=1) + "\n", encoding="utf-8")
        folder.chmod(0o755)  # mkdtemp's are for their owner only
        folder.replace(target)
    except OSError as error:
        raise FastdiffError(f"{str(target)!r} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return target


def check_target(target: Path) -> None:
    if target.exists():
        raise BadConfig(f"{str(target)!r} exists; give the name of a new directory")
    if not target.parent.is_dir():
        raise BadConfig(f"directory {str(target.parent)!r} does not exist")


def _check_own(name: str, module: nn.Module) -> None:
    """Refuses what could be written, but not read: adapters, and whatever else the configuration does not tell of."""
    require(module, name)
    if any(type(part).__module__.split(".")[0] == "peft" for part in module.modules()):
        raise UnsupportedModel(
            f"{name} has adapters loaded, which no model's file can hold: unload them (pipe.unload_lora_weights()), "
            "save, and load them on top again"
        )
    if standing(module) is None:
        return
    layers = _described(module)["layers"]
    own = structure(module).state_dict().keys()
    if more := [key for key in module.state_dict() if key.rpartition(".")[0] not in layers and key not in own]:
        raise UnsupportedModel(
            f"{name} holds {', '.join(more[:3])}, which a {type(module).__name__} of its configuration does not have: "
            "unload what was added (an IP-Adapter?), then save"
        )


def _described(part: nn.Module) -> dict[str, Any]:
    state = standing(part)
    assert state is not None
    layers = {name: asdict(m.recipe) for name, m in part.named_modules() if isinstance(m, QLayer)}
    origin = None if state.origin is None else state.origin.model_dump(mode="json")
    return {"method": state.method, "origin": origin, "layers": layers, "times": state.present.times}
