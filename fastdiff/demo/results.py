"""What the page says of a pair of pictures, and the benchmarks it can show."""

from __future__ import annotations

import json
import math
import statistics
from html import escape
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from PIL import Image

from fastdiff import strip
from fastdiff.config import Config
from fastdiff.errors import BadConfig, FastdiffError
from fastdiff.studio.comparing import psnr, values

from .easel import Pair, Progress

UNSTEADY = ", and the machine was busy: a computed step took much longer in one of them, so the ratio means little"
NO_BENCHMARK = "no benchmark yet; fastdiff bench --json FILE makes one, fastdiff demo --bench FILE shows it"
MAX_FILE = 20 << 20  # bytes of a benchmark


def progress(now: Progress) -> str:
    """A line with a bar, for eyes and for screen readers."""
    where = f", step {now.done} of {now.total}" if now.total else ""
    bar = f' value="{now.done}" max="{now.total}"' if now.total else ""
    return (
        f'<label class="progress">{escape(now.doing)}{where}<progress{bar} aria-label="{escape(now.doing)}"></progress>'
        "</label>"
    )


def captions(pair: Pair) -> str:
    """Seconds of both, and their ratio."""
    plain, fast = pair.plain.drawn.seconds, pair.fast.drawn.seconds
    earlier = " (drawn before)" if pair.again else ""
    ratio = plain / max(fast, 1e-9)
    verdict = f"{ratio:.2f} times as fast" if ratio >= 1 else f"{1 / max(ratio, 1e-9):.2f} times as slow"
    return (
        f'<p class="captions"><span>Left: without, <b>{plain:.2f} s</b>{earlier}</span> '
        f"<span>Right: accelerated, <b>{fast:.2f} s</b></span> <span><b>{verdict}</b></span></p>"
        f"<p>One run of each{UNSTEADY if unsteady(pair) else ''}; fastdiff bench measures over many.</p>"
    )


def unsteady(pair: Pair) -> bool:
    """Whether a computed step took much longer in one run than in the other, though both do the same in it."""
    config = Config(**pair.fast.drawn.made.config)
    if config.parallel or config.quant or config.compile.enabled or config.attention.backend:
        return False
    costs = []
    for report in (pair.plain.report, pair.fast.report):
        kinds = strip.cells(report)
        costs.append([t for t, kind in list(zip(report.step_seconds, kinds, strict=True))[1:] if kind == "computed"])
    if not all(costs):
        return False
    plain, fast = map(statistics.fmean, costs)
    return max(plain, fast) > 1.5 * min(plain, fast)


def explanation(pair: Pair) -> str:
    """The strip, and a table of both runs."""
    plain, fast = pair.plain, pair.fast
    psnr, ssim = likeness(pair)
    rows = [
        ("Seconds, whole call", f"{plain.drawn.seconds:.3f}", f"{fast.drawn.seconds:.3f}"),
        ("Seconds, denoising", f"{plain.report.seconds:.3f}", f"{fast.report.seconds:.3f}"),
        ("Steps computed", *(f"{shot.report.computed} of {shot.report.steps}" for shot in (plain, fast))),
        ("PSNR to the plain picture", "", psnr),
        ("SSIM to the plain picture", "", ssim),
        ("Peak memory", *(f"{shot.report.peak_memory_mb:.0f} MB" for shot in (plain, fast))),
        ("Bytes sent to other devices", *(f"{shot.report.bytes_sent:,}" for shot in (plain, fast))),
    ]
    body = "".join(f'<tr><th scope="row">{a}</th><td>{b}</td><td>{c}</td></tr>' for a, b, c in rows)
    note = "" if pair.on_gpu else "<p>Peak memory is that of the whole process since it started.</p>"
    head = '<tr><td></td><th scope="col">Without</th><th scope="col">Accelerated</th></tr>'
    table = f'<table class="numbers"><thead>{head}</thead><tbody>{body}</tbody></table>'
    return f"{strip.html(fast.report, 'What each step did')}{table}{note}"


def likeness(pair: Pair) -> tuple[str, str]:
    """PSNR over all frames and mean SSIM of what was accelerated to what was not, as text."""
    plain, fast = pair.plain.drawn.image, pair.fast.drawn.image
    decibel = psnr(plain, fast)
    return "identical" if math.isinf(decibel) else f"{decibel:.1f} dB", _similar(values(fast), values(plain))


def _similar(a: NDArray, b: NDArray) -> str:
    if find_spec("torchmetrics") is None:
        return "needs torchmetrics"
    from fastdiff.bench.metrics import ssim

    return f"{float(ssim(a, b).mean()):.4f}" if min(a.shape[1:3]) > 10 else "picture too small"


def benchmarks(place: Path) -> list[str]:
    """Names of the benchmark files in a folder, newest first; or the one file."""
    found = [place] if place.is_file() else [file for file in place.glob("*.json") if file.is_file()]
    found = [file for file in found if _rows(file)]
    return [file.name for file in sorted(found, key=lambda file: file.stat().st_mtime, reverse=True)]


def _rows(file: Path) -> list[Any] | None:
    """Rows of a benchmark with its baseline; None for any other file."""
    from fastdiff.bench.row import Row

    try:
        if file.stat().st_size > MAX_FILE:
            return None
        rows = [Row.model_validate(row) for row in json.loads(file.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    return rows if any(row.kind == "baseline" for row in rows) else None


def pareto(place: Path, name: str | None) -> tuple[Any, str]:
    """The picture of a benchmark and the same numbers as a Markdown table."""
    known = benchmarks(place)
    if not known:
        raise BadConfig(NO_BENCHMARK)
    if name is not None and name not in known:
        raise BadConfig(f"benchmark {name[:80]!r} is not there; choose one of {', '.join(known)}")
    if find_spec("matplotlib") is None:
        raise FastdiffError("the picture needs matplotlib: pip install 'fastdiff[demo]'")
    from fastdiff.bench.render import markdown
    from fastdiff.bench.render import pareto as figure

    file = place if place.is_file() else place / (name or known[0])
    rows = _rows(file) or []
    drawn = BytesIO()
    figure(rows).savefig(drawn, format="png", dpi=110)
    return Image.open(drawn), markdown(rows)
