"""Shows a benchmark: Markdown table, Pareto plot, contact sheet."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from .metrics import PSNR_CAP
from .row import Row

_FEW = 12  # points up to which every one can have its name beside it
_FEWER_STYLES = (("goldenrod", "P"), ("tab:brown", "X"), ("darkkhaki", "p"))
_PEER_STYLES = {  # fixed, so that plots of different models can be compared
    "DeepCache": ("tab:green", "^"),
    "cache-dit": ("tab:cyan", ">"),
    "diffusers": ("tab:red", "v"),
    "tgate": ("tab:purple", "D"),
    "tomesd": ("tab:pink", "<"),
}
_OTHER_PEER = ("tab:olive", "h")
_COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("computed", "computed_steps", "d"),
    ("latency s", "latency_s", ".3f"),
    ("IQR", "latency_iqr_s", ".3f"),
    ("speed-up", "speedup", ".2f"),
    ("denoising", "speedup_denoising", ".2f"),
    ("PSNR", "psnr", ".1f"),
    ("SSIM", "ssim", ".4f"),
    ("PSNR conv.", "psnr_converged", ".1f"),
    ("accuracy", "prompt_accuracy", ".3f"),
    ("all right", "all_correct", ".3f"),
    ("peak MB", "peak_memory_mb", ".0f"),
)


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table; a failed row says why."""
    lines = ["| row | steps | " + " | ".join(title for title, _, _ in _COLUMNS) + " |"]
    lines.append("|---|" + "---:|" * (len(_COLUMNS) + 1))
    for row in rows:
        cells = [_cell(row, name, form) for _, name, form in _COLUMNS]
        if row.error is not None:
            cells = [f"failed: {row.error}".replace("|", "\\|"), *[""] * (len(_COLUMNS) - 1)]
        lines.append(f"| {row.name} | {row.steps} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(row: Row, name: str, form: str) -> str:
    value = getattr(row, name)
    if value is None:
        return "–"
    return "identical" if name == "psnr" and value >= PSNR_CAP else format(value, form)


def frontier(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other beats on both axes, in the order of the first."""
    kept: list[int] = []
    for index in sorted(range(len(points)), key=lambda i: points[i], reverse=True):
        if not kept or points[index][1] > points[kept[-1]][1]:
            kept.append(index)
    return kept[::-1]


def pareto(rows: Sequence[Row]) -> Any:
    """A matplotlib figure: quality over speed-up, frontier joined and named, others pale; failed rows are left out."""
    from matplotlib.figure import Figure

    panels = [("psnr", "PSNR against the unaccelerated image, dB")]
    if any(row.psnr_converged is not None for row in rows):
        panels.append(("psnr_converged", "PSNR against the converged solution, dB"))
    figure = Figure(figsize=(7.5 * len(panels), 5.5), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _panel(axes, rows, name, title)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4 * len(panels), fontsize=8)
    good = next(row for row in rows if row.kind == "baseline")
    figure.suptitle(f"{good.model}, {good.scheduler}, {good.steps} steps, {good.prompts} prompts")
    return figure


def _panel(axes: Any, rows: Sequence[Row], name: str, title: str) -> None:
    shown = [row for row in rows if row.error is None and getattr(row, name) is not None]
    finite = [value for row in shown if (value := getattr(row, name)) < PSNR_CAP]
    top = max(finite, default=40.0) + 3  # identical images have no finite PSNR: drawn at the upper edge
    points = [(float(row.speedup or 0), min(float(getattr(row, name)), top)) for row in shown]
    best = frontier(points)
    axes.plot(*zip(*[points[i] for i in best], strict=True), color="0.6", linewidth=1, zorder=1)
    axes.margins(x=0.22)  # room for the labels
    for group, (colour, marker) in _styles(rows).items():
        mine = [i for i, row in enumerate(shown) if _group(row, rows) == group]
        alpha = [1 if i in best else 0.4 for i in mine]
        spots = [points[i] for i in mine] or [(float("nan"), float("nan"))]
        axes.scatter(*zip(*spots, strict=True), c=colour, marker=marker, alpha=alpha or 1, s=30, zorder=2, linewidths=0)
        axes.scatter([], [], c=colour, marker=marker, s=30, label=group)  # a legend entry that is not pale
    named = range(len(shown)) if len(shown) <= _FEW else best
    _name(axes, {i: points[i] for i in named}, {i: _label(shown[i], points[i][1] == top) for i in named})
    axes.set(xlabel="speed-up of the whole call", ylabel=title)
    axes.grid(alpha=0.3)


def _label(row: Row, identical: bool) -> str:
    return f"{row.name} (identical)" if identical and row.kind != "baseline" else row.name


def _name(axes: Any, points: dict[int, tuple[float, float]], labels: dict[int, str]) -> None:
    """Write labels beside points: above or, if the last one is in the way, below."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    before, above = (-1.0, -1.0), True
    for index, (x, y) in sorted(points.items(), key=lambda item: item[1]):
        place = ((x - left) / (right - left), (y - low) / (high - low))
        close = abs(place[0] - before[0]) < 0.15 and abs(place[1] - before[1]) < 0.03
        before, above = place, not (close and above)
        offset = (5, 4 if above else -10)
        axes.annotate(labels[index], (x, y), xytext=offset, textcoords="offset points", fontsize=7)


def _group(row: Row, rows: Sequence[Row]) -> str:
    """What a point is drawn as: its kind, of rivals the package, of fewer steps the scheduler."""
    if row.kind == "peer":
        return str(row.config.get("package", "peer"))
    if row.kind == "fewer_steps":
        own = next(other.scheduler for other in rows if other.kind == "baseline")
        return "fewer steps" if row.scheduler == own else f"fewer {row.name.partition(' ')[2]}"
    return row.kind


def _styles(rows: Sequence[Row]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each group, in the order in which the groups appear."""
    groups = dict.fromkeys(_group(row, rows) for row in rows if row.error is None)
    own = {"baseline": ("black", "o"), "fastdiff": ("tab:blue", "o"), "fewer steps": ("tab:orange", "s")}
    fewer = iter(_FEWER_STYLES * len(groups))
    known = own | _PEER_STYLES
    return {group: known.get(group) or (next(fewer) if group.startswith("fewer ") else _OTHER_PEER) for group in groups}


@dataclass(frozen=True)
class Tile:
    """One picture of a contact sheet: uint8 (height, width, 3), with a label under it."""

    image: NDArray[np.uint8]
    label: str
    colour: str = "black"


def contact_sheet(tiles: Sequence[Tile], columns: int, side: int = 144) -> Image.Image:
    """Pictures in rows of `columns`, small ones enlarged without smoothing, so that every pixel can be judged."""
    font = _font()
    wrapped = [textwrap.wrap(tile.label, side // 6) for tile in tiles]
    height = side + 8 + 13 * max((len(lines) for lines in wrapped), default=1)
    count = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (columns * (side + 8) + 8, count * (height + 4) + 8), "white")
    pen = ImageDraw.Draw(sheet)
    for index, (tile, lines) in enumerate(zip(tiles, wrapped, strict=True)):
        x, y = 8 + index % columns * (side + 8), 8 + index // columns * (height + 4)
        picture = Image.fromarray(tile.image)
        enlarge = picture.width < side
        scale = side / max(picture.size)
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        sheet.paste(picture.resize(size, Image.Resampling.NEAREST if enlarge else Image.Resampling.LANCZOS), (x, y))
        pen.multiline_text((x, y + side + 2), "\n".join(lines), fill=tile.colour, font=font, spacing=1)
    return sheet


def _font() -> Any:
    """matplotlib's own font: Pillow's has no check marks."""
    from matplotlib.font_manager import findfont

    return ImageFont.truetype(findfont("DejaVu Sans"), 10)
