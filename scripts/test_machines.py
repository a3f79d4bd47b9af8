"""The tests as other processors would run them: one machine stands for several.

python scripts/test_machines.py                                    every row that this processor can stand for
python scripts/test_machines.py --rows default --rows two-threads  these alone: after an interruption, the rest
python scripts/test_machines.py --rows avx2 tests/laws             these tests alone
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

ROOT = Path(__file__).parents[1]
TESTS = tuple(f"tests/{room}" for room in ("core", "laws", "caching", "quant", "ecosystem", "parallel"))
CPU = Path("/proc/cpuinfo")
_AVX512 = ("avx512f", "avx512bw", "avx512dq", "avx512vl")


@dataclass(frozen=True)
class Row:
    """A processor to stand for: what torch or oneDNN is told, and the flags that this one needs to obey."""

    needs: tuple[str, ...] = ()
    told: dict[str, str] = field(default_factory=dict)
    threads: int = 1


ROWS = {
    "one-thread": Row(),
    "two-threads": Row(threads=2),
    "default": Row((), {"ATEN_CPU_CAPABILITY": "default"}),
    "avx2": Row(("avx2", "fma"), {"ATEN_CPU_CAPABILITY": "avx2"}),
    "avx512": Row(_AVX512, {"ATEN_CPU_CAPABILITY": "avx512"}),
    "onednn-avx2": Row(("avx2", "fma"), {"ONEDNN_MAX_CPU_ISA": "AVX2"}),
    "onednn-avx512": Row(_AVX512, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}),
    "onednn-vnni": Row((*_AVX512, "avx512_vnni"), {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"}),
    "onednn-amx": Row((*_AVX512, "amx_int8", "amx_bf16"), {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_AMX"}),
}


def main(
    tests: Annotated[list[str] | None, typer.Argument(help="what pytest is given; else the rooms that compute")] = None,
    rows: Annotated[list[str] | None, typer.Option(help=f"one of {', '.join(ROWS)}; may be repeated")] = None,
    logs: Annotated[Path, typer.Option(help="pytest's output goes here, a file a row")] = ROOT / "build/test-machines",
) -> None:
    if unknown := set(rows or ()) - set(ROWS):
        raise typer.BadParameter(
            f"no row {', '.join(sorted(unknown))}; rows are {', '.join(ROWS)}", param_hint="--rows"
        )
    logs.mkdir(parents=True, exist_ok=True)
    known, failed = flags(CPU.read_text(encoding="utf-8") if CPU.exists() else ""), 0
    for name in rows or ROWS:
        if lacking := [flag for flag in ROWS[name].needs if flag not in known]:
            print(f"{name:14} not on this processor, which lacks {' '.join(lacking)}", flush=True)
            continue
        began = time.monotonic()
        code, text = run(ROWS[name], tests or TESTS, logs / f"{name}.log")
        failed += code != 0
        seconds = time.monotonic() - began
        print(f"{name:14} {counted(text)}, {seconds:.0f} s{'' if code == 0 else f', exit {code}'}", flush=True)
        for line in re.findall(r"^(?:FAILED|ERROR) .*", text, re.MULTILINE):
            print(f"  {line}", flush=True)
    raise typer.Exit(failed > 0)


def flags(cpuinfo: str) -> set[str]:
    """What the processor can do, in Linux' words; nothing is known elsewhere, and rows that need something are left
    out."""
    found = re.search(r"^flags\s*:(.*)$", cpuinfo, re.MULTILINE)
    return set(found[1].split()) if found else set()


def run(row: Row, tests: tuple[str, ...] | list[str], log: Path) -> tuple[int, str]:
    """Exit code and output of pytest, with as many workers as there are cores for their threads."""
    workers = max(1, (os.cpu_count() or 1) // row.threads)
    options = ["-q", "-n", str(workers), "--dist", "loadgroup", "--threads", str(row.threads)]
    with log.open("w", encoding="utf-8") as out:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *options, *tests],
            cwd=ROOT, env={**os.environ, **row.told}, stdout=out, stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
    return done.returncode, log.read_text(encoding="utf-8")


def counted(text: str) -> str:
    """Passed and failed, from pytest's last line; a run that has none is said to have broken off."""
    lines = [line for line in text.splitlines() if re.search(r"\d+ (passed|failed|errors?)\b.* in ", line)]
    if not lines:
        return "broke off"
    number = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|errors?)\b", lines[-1])}
    failed = sum(n for word, n in number.items() if word != "passed")
    return f"{number.get('passed', 0)} passed, {failed} failed"


if __name__ == "__main__":
    typer.run(main)
