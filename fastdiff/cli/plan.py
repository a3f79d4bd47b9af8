"""`fastdiff plan`: what each parallel method is predicted to bring on some devices and a link between them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fastdiff.parallel import Codec

from .options import Json, ModelName, StepCount

if TYPE_CHECKING:
    from fastdiff.parallel.planner import Plan, Prediction

NOTE = (
    "seconds of a step on one device and of a rank's part are measured here, bytes are counted; step times, speed-ups "
    "and memory are predictions for devices like this one, of the denoising alone"
)


def plan(
    devices: Annotated[int, typer.Option(min=2, help="Devices that share one picture.")],
    link: Annotated[float, typer.Option(metavar="GBPS", help="Gigabytes a second that each device can send.")],
    model: ModelName = "shapes-unet",
    size: Annotated[
        int | None, typer.Option(metavar="PX", min=1, help="Sides of the picture. Default: the pipeline's own.")
    ] = None,
    steps: StepCount = None,
    latency: Annotated[float, typer.Option(metavar="US", min=0, help="Microseconds of a message.")] = 20.0,
    memory: Annotated[
        float | None, typer.Option(metavar="GIB", help="Memory of each device. Default: as here; a CPU's is shared.")
    ] = None,
    codec: Annotated[Codec, typer.Option(help="Keys and values on the wire.")] = "raw",
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None, typer.Option(help="Default: as generate takes it.")
    ] = None,
    cache: Annotated[
        list[str] | None, typer.Option(metavar="METHOD", help="Count what this cache would hold too; repeatable.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Predict step time, speed-up and memory of each parallel method, and recommend one.

    Exit 1 where none is predicted to be faster than one device and to fit.
    """
    from fastdiff.errors import BadConfig, FastdiffError

    for name, value in (("--link", link), ("--memory", 1.0 if memory is None else memory)):
        if not 0 < value < float("inf"):
            raise BadConfig(f"{name} {value:g}: give a number above 0")
    import torch

    from fastdiff.pipelines.loading import call_defaults
    from fastdiff.pipelines.plan import plan_parallel
    from fastdiff.studio.console import waiting
    from fastdiff.studio.drawing import foretold
    from fastdiff.studio.holding import cache_bytes

    room, given = None if memory is None else memory * 2**30, getattr(torch, dtype) if dtype else None
    pipe = foretold(model, devices, given, room)
    pipe.set_progress_bar_config(disable=True)
    with waiting("measuring"):
        found = plan_parallel(
            pipe, devices, link * 1e9, size=size, steps=steps, latency=latency * 1e-6, codec=codec, memory=room,
        )  # fmt: skip
    asked: dict[str, Any] = {"model": model, "size": size, "devices": devices, "link_gb_per_second": link}
    asked |= {"latency_us": latency, "cache_bytes": cache_bytes(pipe, cache or [], size)}
    asked |= {"steps": steps or call_defaults(pipe).get("num_inference_steps", 50)}
    _tell(found, asked, as_json)
    if found.best is None:
        raise FastdiffError(
            f"no parallel method is predicted to fit and to be faster than one device on {devices} devices with "
            f"{link:g} GB/s; use one device, a larger picture or a faster link"
        )


def _tell(found: Plan, asked: dict[str, Any], as_json: bool) -> None:
    import json

    from fastdiff.studio.console import print_table, say

    best = found.best
    if as_json:
        told = {
            "measured_one_device_step_seconds": found.one_step,
            "predicted_one_device_memory": found.one_memory,
            "methods": [row.to_dict() for row in found.rows],
            "recommended": None if best is None else best.settings,
            "note": NOTE,
        }
        print(json.dumps(asked | told))
        return
    head = ("rank s\nmeasured", "MB/step\ncounted", "s/step\npredicted", "speed-up\npredicted", "GiB\npredicted")
    print_table([_row(row) for row in found.rows if row.mesh], "method", "result", "mesh", *head)
    for row in found.rows:
        if row.refused:
            print(f"{_named(row)} is refused: {row.refused}")
    say(f"one device: {found.one_step:.4g} s a step, measured here; {NOTE}; a mesh is cfg x step x patch")
    for name, held in asked.get("cache_bytes", {}).items():
        say(f"cache.method={name} would hold {held / 1e6:.4g} MB on one device, counted on the first step")
    if best is not None:
        chosen = {key: str(value).lower() for key, value in best.settings.items() if key != "devices"}
        sets = " ".join(f"--set parallel.{key}={told}" for key, told in chosen.items() if told not in ("1", "raw"))
        model = f"-m {asked['model']} --devices {asked['devices']}"
        say(f"recommended{', exact' * best.exact}: fastdiff generate PROMPT {model} {sets}")


def _named(row: Prediction) -> str:
    more = (f", {name} = {row.settings[name]}" for name in ("shard", "groups", "halves") if name in row.settings)
    return row.method + "".join(more).lower()


def _row(row: Prediction) -> tuple[str, ...]:
    return (
        _named(row), "refused" if row.refused else "exact" if row.exact else "near", "x".join(map(str, row.mesh or ())),
        f"{row.rank_seconds:.4g}", f"{row.counted_bytes / 1e6:.3g}", f"{row.predicted_step_seconds:.4g}",
        f"{row.predicted_speedup:.2f}", f"{row.predicted_memory / 2**30:.2f}",
    )  # fmt: skip
