"""A soak of parallel runs: real ranks over gloo draw tiny pictures of mixed sizes, and lose one another now and then.

Methods change between pictures. Round 0 is long: a rank raises in some of its pictures, and all go on with the next
one. Every further round ends with a picture in which a rank is killed (SIGKILL) or stopped (SIGSTOP, and woken once the
others have ended), between two steps or within one, under `on_peer_loss` = raise and local.

What is checked of each picture of each rank: an exact method gives the picture of one device; a displaced one gives
what it gave in new processes without faults, and, from the step in which a rank is left alone, what one device makes
of that. After a loss the pipeline draws as on one device again. Of each loss: how long it took until the others knew.
Of each rank: its memory. Models have random weights in float64, so that nothing but a mistake is seen as a difference.

    python scripts/soak_parallel.py [--pictures 500] [--rounds 25] [--json benchmarks/soak-parallel.json]

A run that was stopped goes on with the rounds that the file does not have.
"""

from __future__ import annotations

import faulthandler
import json as jsonlib
import logging
import os
import signal
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from torch import Tensor

import fastdiff
from fastdiff import output
from fastdiff.bench.row import command, environment
from fastdiff.errors import PeerLost
from scripts.soak_draws import METHODS, NEAR, RANKS, SIZES, STEPS, Draw, plan
from tests import tiny
from tests.forks import renew_threads

TIMEOUT = 15.0
SAME = 1e-11  # of the latents' norm
SILENCE = 600.0  # seconds without a word of any rank, after which all of them hang
FIRST = 140  # pictures of round 0
HOW = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}


class Planned(Exception):
    """What a rank raises in the middle of a picture."""


def away(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


class Course:
    """What happens on one rank while a picture is drawn. kept: latents after each step; gone: when this rank knew that
    it is alone, and `first` the first step that ended so; slowest: seconds of a step before the fault."""

    def __init__(self, draw: Draw, crew: Any, fault: Path, mine: bool) -> None:
        self.draw, self.crew, self.fault, self.due = draw, crew, fault, bool(draw.fault) and mine
        self.kept, self.gone = list[Tensor](), list[float]()
        self.first: int | None = None
        self.slowest, self._began = 0.0, time.monotonic()
        crew.forget.append(lambda: self.gone.append(time.monotonic()))

    @contextmanager
    def within(self, denoiser: torch.nn.Module) -> Iterator[None]:
        """One layer may be where the fault is."""
        leaves = [m for m in denoiser.modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))]
        leaf = leaves[int((self.draw.depth or 0) * len(leaves))]
        hook = leaf.register_forward_pre_hook(lambda *_: self._strike(self.draw.depth is not None))
        yield
        hook.remove()

    def stepped(self, pipe: Any, step: int, timestep: Any, given: dict) -> dict:
        self.kept.append(given["latents"].clone())
        began, self._began = self._began, time.monotonic()
        if not self.draw.fault or step < self.draw.at:
            self.slowest = max(self.slowest, self._began - began)
        if self.crew.bus.alone and self.first is None:
            self.first = step
        self._strike(self.draw.depth is None)
        return given

    def _strike(self, here: bool) -> None:
        if not (here and self.due and len(self.kept) > self.draw.at - (self.draw.depth is not None)):
            return
        self.due = False
        self.fault.write_text(str(time.monotonic()), encoding="ascii")
        if self.draw.fault == "raised":
            raise Planned
        os.kill(os.getpid(), HOW[self.draw.fault])


class Rank:
    """What one process draws in a round, and what it says of it: one line of JSON for each picture."""

    def __init__(self, folder: Path, number: int, rank: int) -> None:
        self.folder, self.number, self.rank = folder, number, rank
        self.pipes = {name: self.made(name) for name in SIZES}
        self.slowest, self.fault = 0.0, folder / f"{number}.fault"

    def made(self, name: str) -> Any:
        return tiny.make(name).to(torch.float64)

    def say(self, **told: Any) -> None:
        say(self.folder / f"{self.number}.{self.rank}.jsonl", **told)

    def has(self, name: str) -> bool:
        return (self.folder / f"{name}.pt").exists()

    def known(self, name: str) -> list[Tensor]:
        return torch.load(self.folder / f"{name}.pt")

    def alone(self, draw: Draw, begin: int = -1, latents: Tensor | None = None) -> list[Tensor]:
        """Latents after each step on one device, which after step `begin` goes on from others."""
        kept: list[Tensor] = []

        def callback(pipe: Any, step: int, timestep: Any, given: dict) -> dict:
            if step == begin and latents is not None:
                given["latents"] = latents.clone()
            kept.append(given["latents"].clone())
            return given

        self.pipes[draw.model](**draw.call(), callback_on_step_end=callback)
        return kept

    def drawn(self, draw: Draw, index: int, reference: bool = False) -> None:
        """One picture by all ranks."""
        pipe = self.pipes[draw.model]
        asked = METHODS[draw.method] | {"timeout": TIMEOUT, "on_peer_loss": draw.loss}
        handle = fastdiff.accelerate(pipe, parallel=asked)
        course = Course(draw, handle.crew, self.fault, draw.who == self.rank)
        with course.within(tiny.denoiser(pipe)):
            try:
                pipe(**draw.call(), callback_on_step_end=course.stepped)
                outcome, error = "alone" if course.gone else "whole", " ".join(handle.report.notes)
            except (PeerLost, Planned) as raised:
                outcome, error = type(raised).__name__, str(raised)
        ended = time.monotonic()
        self._restored(handle, draw, outcome)
        if reference:
            if self.rank == 0:
                torch.save(course.kept, self.folder / f"{draw.picture} {draw.method}.pt")
            return
        self.slowest = max(self.slowest, course.slowest)
        told: dict[str, Any] = {"index": index, "outcome": outcome, "step_seconds": self.slowest}
        if draw.fault and draw.who != self.rank and self.fault.exists() and outcome != "whole":
            told["said"] = error
            told["waited"] = (course.gone or [ended])[0] - float(self.fault.read_text(encoding="ascii"))
        self.say(**told, **self._checked(draw, outcome, course), rss=resident())

    def _restored(self, handle: Any, draw: Draw, outcome: str) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            handle.restore()
        if draw.method == "pipefusion" and outcome != "whole":  # others' blocks are lost with them
            self.pipes[draw.model] = self.made(draw.model)

    def _checked(self, draw: Draw, outcome: str, course: Course) -> dict[str, float]:
        """How far the picture is from what it should be; and the next one on one device, where a rank was lost."""
        plain, found = self.known(draw.picture)[-1], {}
        if outcome in ("whole", "alone"):
            found["away"] = away(course.kept[-1], self._wanted(draw, course) if draw.method in NEAR else plain)
        if outcome != "whole":
            found["away_afterwards"] = away(self.alone(draw)[-1], plain)
        return found

    def _wanted(self, draw: Draw, course: Course) -> Tensor:
        near, step = self.known(f"{draw.picture} {draw.method}"), course.first
        if step is None:
            return near[-1]
        if "parastep" in draw.method and step:  # an open cycle is computed again from its beginning
            step -= (step - 1) % (RANKS // METHODS[draw.method].get("cfg", 1))
        return self.alone(draw, step - 1, near[step - 1] if step else None)[-1]


def say(file: Path, **told: Any) -> None:
    with file.open("a", encoding="utf-8") as lines:
        lines.write(jsonlib.dumps(told) + "\n")


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def references(rank: Rank, draws: list[Draw]) -> None:
    """What one device draws, a share by each rank; then what displaced methods draw without faults."""
    pictures = {d.picture: d for d in draws if not rank.has(d.picture)}
    dist.barrier()  # nobody makes a file before all have looked
    for k, (name, draw) in enumerate(pictures.items()):
        if k % RANKS == rank.rank:
            torch.save(rank.alone(draw), rank.folder / f"{name}.pt")
    dist.barrier()
    named = {f"{d.picture} {d.method}": d for d in draws if d.method in NEAR}
    near = {name: d for name, d in named.items() if not rank.has(name)}
    dist.barrier()
    for draw in near.values():
        rank.drawn(Draw(draw.model, draw.size, draw.seed, draw.method), 0, reference=True)


def soak(rank: Rank, draws: list[Draw]) -> None:
    for index, draw in enumerate(draws):
        rank.drawn(draw, index)
        if draw.fault == "raised":
            dist.barrier()  # the default group is the user's own: nobody closes it
            if rank.rank == 0:
                rank.fault.unlink(missing_ok=True)
            dist.barrier()


def process(folder: Path, number: int, rank: int, work: Callable[[Rank], None]) -> None:
    """A forked process, which never comes back."""
    try:
        renew_threads()
        faulthandler.register(signal.SIGUSR1)
        store = dist.FileStore(str(folder / f"{number}.store"), RANKS)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
        work(Rank(folder, number, rank))
        os._exit(0)
    except BaseException as error:
        traceback.print_exc()
        say(folder / f"{number}.{rank}.jsonl", broke=f"{type(error).__name__}: {error}")
        os._exit(1)


def together(folder: Path, number: int, work: Callable[[Rank], None]) -> bool:
    """Start all ranks, wake who was stopped once the others have ended; whether none of them hung."""
    left, stopped, heard = set[int](), set[int](), time.monotonic()
    for rank in range(RANKS):
        child = os.fork()
        if not child:
            process(folder, number, rank, work)
        left.add(child)
    while left:
        for child in list(left):
            done, status = os.waitpid(child, os.WNOHANG | os.WUNTRACED)
            if done:
                (stopped.add if os.WIFSTOPPED(status) else left.discard)(child)
                heard = time.monotonic()
        if left and left == stopped:
            _tell(stopped, signal.SIGCONT)
            stopped.clear()
        heard = max(heard, *(time.monotonic() - time.time() + file.stat().st_mtime for file in folder.iterdir()))
        if time.monotonic() - heard > SILENCE:
            _tell(left, signal.SIGUSR1)
            time.sleep(1)
            _tell(left, signal.SIGKILL)
            return False
        time.sleep(0.05)
    return True


def _tell(children: set[int], how: signal.Signals) -> None:
    for child in children:
        os.kill(child, how)


def round_(folder: Path, number: int, draws: list[Draw]) -> dict[str, Any]:
    """One round, as a row of the file."""
    began = time.monotonic()
    ended = together(folder, number, partial(soak, draws=draws))
    files = [folder / f"{number}.{rank}.jsonl" for rank in range(RANKS)]
    told = [list(map(jsonlib.loads, f.read_text(encoding="utf-8").splitlines())) if f.exists() else [] for f in files]
    lines = [(rank, line) for rank, some in enumerate(told) for line in some if "index" in line]
    wrong = [
        asdict(draws[line["index"]]) | {"of": rank} | line
        for rank, line in lines
        if not all(line.get(key, 0.0) < SAME for key in ("away", "away_afterwards"))
    ]
    faults = []
    for index, draw in enumerate(draws):
        if draw.fault:
            here = {rank: line for rank, line in lines if line["index"] == index}
            waits = {r: round(line["waited"], 2) for r, line in here.items() if "waited" in line}
            over = [line["waited"] - TIMEOUT - line["step_seconds"] for line in here.values() if "waited" in line]
            late = [line["said"] for line in here.values() if line.get("waited", 0.0) > TIMEOUT / 2]
            faults.append({
                "fault": draw.fault, "model": draw.model, "method": draw.method, "on_peer_loss": draw.loss,
                "rank": draw.who, "step": draw.at, "within": draw.depth is not None,
                "outcomes": {rank: line["outcome"] for rank, line in here.items()},
                "waited": waits, "late": late, "over_limit": round(max(over), 2) if over else None,
            })  # fmt: skip
    return {
        "round": number, "pictures": len(draws), "seconds": round(time.monotonic() - began, 1), "hung": not ended,
        "compared": sum("away" in line for _, line in lines),
        "most_away": max((line["away"] for _, line in lines if "away" in line), default=0.0), "wrong": wrong,
        "broke": [line["broke"] for some in told for line in some if "broke" in line],
        "methods": dict(Counter(draw.method for draw in draws)), "faults": faults,
        "step_seconds": round(max((line["step_seconds"] for _, line in lines), default=0.0), 2),
        "rss_mb": [[round(line["rss"] / 1e6, 1) for r, line in lines if r == rank] for rank in range(RANKS)],
    }  # fmt: skip


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """`rss_mb`: of round 0, the mean of the first and of the last quarter of its pictures, by rank."""
    faults = [fault for row in rows for fault in row["faults"]]
    over = [fault["over_limit"] for fault in faults if fault["over_limit"] is not None]
    waits: dict[str, list[float]] = {}
    for fault in faults:
        waits.setdefault(fault["fault"], []).extend(fault["waited"].values())
    quarters = [
        [round(mean(one[: len(one) // 4]), 1), round(mean(one[-(len(one) // 4) :]), 1)]
        for row in rows if row["round"] == 0 for one in row["rss_mb"]
    ]  # fmt: skip
    return {
        "pictures": sum(row["pictures"] for row in rows), "compared": sum(row["compared"] for row in rows),
        "wrong": sum(len(row["wrong"]) for row in rows), "most_away": max(row["most_away"] for row in rows),
        "hung": sum(row["hung"] for row in rows), "broke": sum(len(row["broke"]) for row in rows),
        "faults": dict(Counter(f"{fault['fault']} under {fault['on_peer_loss']}" for fault in faults)),
        "slowest_wait_seconds": {kind: max(some, default=0.0) for kind, some in waits.items()},
        "slowest_over_limit_seconds": max(over, default=None), "rss_mb": quarters,
    }  # fmt: skip


def main(
    pictures: Annotated[int, typer.Option(min=FIRST, help="in all")] = 500,
    rounds: Annotated[int, typer.Option(min=2, help="of which the first is long")] = 25,
    seed: Annotated[int, typer.Option(help="of all that is left to chance")] = 0,
    only: Annotated[list[int] | None, typer.Option(help="rounds to run; all by default")] = None,
    json: Annotated[Path, typer.Option(help="file to write")] = Path("benchmarks/soak-parallel.json"),
) -> None:
    """Run the rounds that the file does not have; 1 where anything was wrong."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    each, more = divmod(pictures - FIRST, rounds - 1)
    plans = {0: plan(seed, 0, FIRST)} | {k: plan(seed, k, each + (k <= more)) for k in range(1, rounds)}
    facts = {
        "command": command(), "remark": (__doc__ or "").splitlines()[0], "seed": seed, "ranks": RANKS, "steps": STEPS,
        "timeout": TIMEOUT, "same": SAME, "environment": environment(tiny.make("sd15")),
    }  # fmt: skip
    rows = jsonlib.loads(json.read_text(encoding="utf-8"))["rounds"] if json.exists() else []
    left = [k for k in plans if k not in {row["round"] for row in rows} and (not only or k in only)]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for number in left:
            ended = together(place, -number - 1, partial(references, draws=plans[number]))
            said = [file.read_text(encoding="utf-8") for file in place.glob("-*.jsonl")]
            assert ended and not said, said
            rows = sorted([*rows, round_(place, number, plans[number])], key=lambda row: row["round"])
            print(jsonlib.dumps({k: v for k, v in rows[-1].items() if k not in ("rss_mb", "methods")}), flush=True)
            told = jsonlib.dumps(facts | summary(rows) | {"rounds": rows}, indent=1) + "\n"
            output.write(json, lambda part, told=told: part.write_text(told, encoding="utf-8"))
    if any(row["hung"] or row["wrong"] or row["broke"] for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    typer.run(main)
