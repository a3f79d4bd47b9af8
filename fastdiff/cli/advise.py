"""`fastdiff advise`: what a model needs, whether it fits, which levers first, and the line to type."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from .options import Json, ModelName

if TYPE_CHECKING:
    from fastdiff.studio.advising import Advice

NOTE = (
    "counted from the model's structure: nothing was computed or timed; what each lever brings, bench and plan measure"
)


def advise(
    model: ModelName = "shapes-unet",
    memory: Annotated[float | None, typer.Option(metavar="GB", help="Of a GPU. Default: this machine's.")] = None,
    devices: Annotated[int, typer.Option(min=1, help="Devices that share one picture.")] = 1,
    link: Annotated[
        float | None, typer.Option(metavar="GBPS", help="Gigabytes a second that each device can send.")
    ] = None,
    size: Annotated[
        int | None, typer.Option(metavar="PX", min=1, help="Sides of the picture. Default: the pipeline's own.")
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None, typer.Option(help="Default: as it fits.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what a model needs in memory, whether that fits, which levers to pull first, and the command for it.

    No weights are read of a model in a directory. Exit 1 where nothing makes it fit.
    """
    from fastdiff.errors import BadConfig, FastdiffError

    for name, value in (("--memory", memory), ("--link", link)):
        if value is not None and not 0 < value < float("inf"):
            raise BadConfig(f"{name} {value:g}: give a number above 0")
    if (devices > 1) != (link is not None):
        raise BadConfig("--devices and --link go together: what devices send each other decides")
    import torch

    from fastdiff.studio import advising
    from fastdiff.studio.console import quiet, waiting

    quiet()
    with waiting("counting"):
        found = advising.advise(
            model, memory=None if memory is None else memory * 1e9, devices=devices,
            link=None if link is None else link * 1e9, size=size, dtype=getattr(torch, dtype) if dtype else None,
        )  # fmt: skip
    if as_json:
        print(json.dumps(found.to_dict() | {"note": NOTE}))
    else:
        _tell(found)
    if found.fit is None:
        raise FastdiffError(
            f"{model} needs {found.total / 1e9:.3g} GB at least, there are {found.memory / 1e9:.3g}; draw smaller "
            "pictures (--size), or take a larger device"
        )


def _tell(found: Advice) -> None:
    from fastdiff.studio.console import print_table, say

    needs = found.needs
    sides = "" if found.size is None else f", {found.size[0]} x {found.size[1]}"
    rows = [(f"weights of {name}", _gb(size)) for name, size in needs.weights.items()]
    rows += [(f"a step{sides}", _gb(needs.step)), ("what the cache holds", _gb(needs.cache))]
    rows.append((f"decoding{sides}", "not counted" if needs.decode is None else _gb(needs.decode)))
    how = "" if found.fit is None else " ".join(found.fit.flags) or "as it is"
    rows.append(("at most, of " + _gb(found.memory), f"{_gb(found.total)} {how}"))
    print_table(rows, f"{found.pipeline}, {found.dtype}", "GB")
    for number, lever in enumerate(found.levers, 1):
        print(f"{number}. {lever.name} ({' '.join(lever.flags)}): {lever.why}")
    if found.fit is not None:
        print(found.command)
    say(NOTE)


def _gb(size: float) -> str:
    return f"{size / 1e9:.3g}"
