"""`fastdiff calibrate` for layers that wait: in all ranks of a displaced method, of which the first writes the plan."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .calibration import Calibration, progress

if TYPE_CHECKING:
    from fastdiff.config import Layer


def asks(layers: list[Layer]) -> bool:
    """Whether there is a budget of bytes for layers that wait, and neither a cache nor a solver to calibrate."""
    tables = [values.get("parallel") for _, values in layers]
    others = any(values.get(lever) for _, values in layers for lever in ("cache", "solver"))
    return not others and any(isinstance(table, dict) and table.get("sync_kb") for table in tables)


def calibrate_waiting(asked: Calibration, output: Path, prompts: int, as_json: bool) -> int:
    """Start the ranks, if this is not one of them; the exit code. Raises BadConfig where their number is not given."""
    from fastdiff.config import resolve
    from fastdiff.errors import BadConfig
    from fastdiff.studio import ranks, settings
    from fastdiff.studio.drawing import described

    layers = [(origin, unplanned(values, "parallel")) for origin, values in asked.layers]
    if ranks.launched():
        return _work(asked, layers, output, prompts, as_json)
    resolved = settings.early(layers, described(asked.model), asked.model) or resolve(layers, None, asked.model)
    devices = getattr(resolved.config.parallel, "devices", None)
    if not devices:
        raise BadConfig("layers wait for other ranks: say how many there are with --set parallel.devices=N")
    return ranks.launch(devices, settings.timeout(layers), _work, asked, layers, output, prompts, as_json)


def unplanned(values: Mapping[str, Any], lever: str) -> Mapping[str, Any]:
    """A config's values without the plan of one lever, which is still to be made."""
    table = values.get(lever)
    if not isinstance(table, dict):
        return values
    return {**values, lever: {key: value for key, value in table.items() if key != "plan"}}


def _work(asked: Calibration, layers: list[Layer], output: Path, prompts: int, as_json: bool) -> int:
    import json

    import torch.distributed as dist

    from fastdiff import output as files
    from fastdiff.pipelines.freshness import calibrate_layers
    from fastdiff.studio.console import say

    pipe, config = asked.loaded(layers)
    texts = asked.texts(pipe, prompts)
    call = asked.call(pipe, texts)
    with progress() as watch:
        found = calibrate_layers(pipe, config, texts, watch=watch, **call)
    plan = found.parallel.plan  # type: ignore[union-attr]
    if dist.get_rank() == 0:
        files.write(output, lambda part: part.write_text(plan.model_dump_json(indent=2) + "\n", encoding="utf-8"))
        print(json.dumps({"file": str(output)} | plan.model_dump(mode="json")) if as_json else output)
        if not as_json:
            say(plan.summary())
    return 0
