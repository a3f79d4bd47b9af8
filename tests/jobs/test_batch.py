"""`fastdiff generate --prompt-file F -o DIR/`: a job that survives being broken off, started again, and shared."""

from __future__ import annotations

import json
import os
import signal
import time
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from fastdiff.cli import run
from fastdiff.images import read
from fastdiff.jobs.manifest import CLAIMS
from fastdiff.studio import drawing, wanted
from tests.forks import renew_threads

LINES = ['{"prompt": "a cat"}', '{"prompt": "a dog", "seed": 5, "steps": 2}', '{"prompt": "a cat"}']


def job(*lines: str, name: str = "p.jsonl") -> None:
    Path(name).write_text("\n".join(lines), encoding="utf-8")


def command(model: str, *more: object) -> list[object]:
    return ["generate", "--prompt-file", "p.jsonl", "-o", "out/", "-m", model, "--steps", 1, *more]


def manifest() -> list[dict]:
    return [json.loads(line) for line in Path("out/manifest.jsonl").read_text().splitlines()]


def pictures() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path("out").glob("*.png"))}


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Prompts that were really drawn."""
    drawn: list[str] = []
    draw = drawing.Studio.draw

    def counting(self, job, on_step_end=None):
        drawn.append(job.prompt)
        return draw(self, job, on_step_end)

    monkeypatch.setattr(drawing.Studio, "draw", counting)
    return drawn


def test_job(cli, model: str, counted: list[str]) -> None:
    job(*LINES)
    done = cli(*command(model))
    assert done.code == 0, done.err
    rows = manifest()
    assert [(row["prompt"], row["status"], row["where"]) for row in rows] == [
        ("a cat", "done", "p.jsonl line 1"), ("a dog", "done", "p.jsonl line 2"), ("a cat", "done", "p.jsonl line 3"),
    ]  # fmt: skip
    assert done.files == [f"out/{row['file']}" for row in rows]
    assert rows[0]["seed"] != rows[2]["seed"]  # said twice, wanted twice
    made = read(Path(done.files[1]))
    assert (made.seed, made.steps, made.job) == (5, 2, rows[1]["id"])
    assert "3 drawn now, 3 of 3 done" in done.err
    assert not list(Path("out", CLAIMS).glob("[!m]*.lock"))


def test_restart_does_only_what_is_missing(cli, model: str, counted: list[str], monkeypatch) -> None:
    job(*LINES)
    cli(*command(model))
    before = pictures()
    Path("out", manifest()[1]["file"]).unlink()
    counted.clear()
    assert cli(*command(model)).code == 0
    assert (counted, pictures()) != ([], before)
    assert counted == ["a dog"]
    assert pictures().keys() == before.keys()
    monkeypatch.setattr(drawing, "load", lambda *_, **__: pytest.fail("nothing is missing, no model is needed"))
    done = cli(*command(model))
    assert (done.code, done.out) == (0, "")
    assert "3 of 3 pictures are there already" in done.err


def test_the_same_job_again_gives_the_same_pixels(cli, model: str) -> None:
    job(*LINES)
    cli(*command(model, "--no-metadata"))
    before = pictures()
    done = cli(*command(model, "--no-metadata", "--overwrite"))
    assert "3 drawn now" in done.err
    assert pictures() == before


def test_other_settings_are_another_picture(cli, model: str) -> None:
    job(LINES[1])
    cli(*command(model))
    before = pictures()
    done = cli(*command(model, "--guidance-scale", 3))
    assert done.files == ["out/a-dog_seed_5-1.png"]
    assert pictures().items() >= before.items()
    assert [row["status"] for row in manifest()] == ["done", "done"]


def test_mistakes_are_told_with_their_line_and_the_rest_goes_on(cli, model: str) -> None:
    job("{oops", '{"prompt": "a cat"}', '["a"]', '{"prompt": "b", "sed": 1}', '{"prompt": "c", "width": 60}', "",
        '{"prompt": "\\ud800"}', '{"prompt": "d", "seed": -1}', f'{{"prompt": "{"x" * 100_000}"}}')  # fmt: skip
    done = cli(*command(model))
    assert done.code == 1
    assert len(done.files) == 1
    for line in (
        "p.jsonl line 1: not JSON", "p.jsonl line 3: needs an object with a prompt",
        "p.jsonl line 4: unknown key 'sed', did you mean 'seed'?", "p.jsonl line 5: width 60: this model draws",
        "p.jsonl line 7: prompt", "p.jsonl line 8: seed = -1", "p.jsonl line 9: prompt = xxx",
    ):  # fmt: skip
        assert f"warning: {line}" in done.err
    assert "1 drawn now, 1 of 2 done, 1 failed, 6 lines refused" in done.err
    assert [row["status"] for row in manifest()] == ["done", "failed", *["refused"] * 6]
    job('{"prompt": "a dog"}', '{"prompt": "a cat"}')
    again = cli(*command(model))
    assert (again.code, len(again.files)) == (0, 1)
    assert {row["status"] for row in manifest()} == {"done", "failed"}  # the width is still in the folder's book


def test_a_line_that_is_no_utf8_costs_that_line_only(cli, model: str) -> None:
    Path("p.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "a cat"}\n{"prompt": "\xff"}\n')
    done = cli(*command(model))
    assert (done.code, len(done.files)) == (1, 1)
    assert "warning: p.jsonl line 2: not UTF-8 text" in done.err


def test_nothing_but_mistakes_leaves_nothing(cli) -> None:
    job("{oops", "1")
    done = cli("generate", "--prompt-file", "p.jsonl", "-o", "out/")
    assert (done.code, done.err) == (
        2,
        "error: p.jsonl line 1: not JSON: Expecting property name enclosed in double quotes\n",
    )
    assert not Path("out").exists()


def test_line_separators_inside_a_prompt(cli, model: str) -> None:
    job('{"prompt": "a\u2028cat\u0085"}', "{oops")
    done = cli(*command(model))
    assert "p.jsonl line 2: not JSON" in done.err
    assert len(done.files) == 1


def test_a_picture_saved_by_a_runner_that_was_killed_is_recognised(cli, model: str, counted: list[str]) -> None:
    job(*LINES)
    cli(*command(model))
    Path("out/manifest.jsonl").unlink()
    counted.clear()
    before = pictures()
    done = cli(*command(model))
    assert (done.code, counted, pictures()) == (0, [], before)
    assert [row["status"] for row in manifest()] == ["done"] * 3


def test_files_of_others_are_left_alone(cli, model: str) -> None:
    job(LINES[1])
    Path("out").mkdir()
    Path("out/a-dog_seed_5.png").write_text("mine")
    assert cli(*command(model)).files == ["out/a-dog_seed_5-1.png"]
    assert Path("out/a-dog_seed_5.png").read_text() == "mine"


@pytest.mark.parametrize("text", ["{", '{"id": "a"}', '{"id":"a","status":"great","where":""}', "\xff\xfe"])
def test_damaged_manifest(cli, model: str, text: str) -> None:
    job(LINES[1])
    Path("out").mkdir()
    Path("out/manifest.jsonl").write_bytes(text.encode("latin-1"))
    done = cli(*command(model))
    assert (done.code, done.out) == (1, "")
    assert "'out/manifest.jsonl' is no manifest; move it away" in done.err


def test_full_disk_ends_the_job(cli, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    job(*LINES)
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        done = cli(*command(model))
    assert done.code == 1
    assert "cannot be written: No space left on device" in done.err
    assert [row["status"] for row in manifest()] == ["pending"] * 3
    assert cli(*command(model)).code == 0


def test_a_claim_of_somebody_alive_is_respected(cli, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other runner lets go without having drawn; only then is its picture drawn here."""
    from fastdiff.jobs import batch

    job(*LINES)
    cli(*command(model))
    first = manifest()[0]
    Path("out", first["file"]).unlink()
    other = FileLock(Path("out", CLAIMS, f"{first['id']}.lock"))
    other.acquire()
    looked = []

    def sleep(_: float) -> None:
        looked.append(len(pictures()))
        if len(looked) == 3:
            other.release()

    monkeypatch.setattr(batch.time, "sleep", sleep)
    done = cli(*command(model))
    assert looked == [2, 2, 2]
    assert "waiting for 1 pictures that another runner is drawing" in done.err
    assert done.files == [f"out/{first['file']}"]


def fork(model: str) -> Any:
    """Another runner, without the seconds that importing everything takes."""

    def draw() -> None:
        os.setsid()
        renew_threads()
        with Path(f"{os.getpid()}.out").open("w") as out, redirect_stdout(out), redirect_stderr(StringIO()):
            code = run([str(part) for part in command(model)])
        os._exit(code)

    process = get_context("fork").Process(target=draw)
    process.start()
    return process


def test_three_runners_one_of_them_killed(cli, model: str) -> None:
    """Each picture is made once and none is lost, whatever the killed one was doing."""
    count = 16
    job(*(json.dumps({"prompt": f"cat number {n}", "seed": n, "steps": 6}) for n in range(count)))
    runners = [fork(model) for _ in range(3)]
    try:
        deadline = time.monotonic() + 900
        while len(list(Path("out").glob("*.png"))) < 3:
            assert time.monotonic() < deadline
            assert any(runner.is_alive() for runner in runners)
            time.sleep(0.02)
        os.kill(runners[0].pid, signal.SIGKILL)
        for runner in runners:
            runner.join(900)
    finally:
        for runner in runners:
            runner.kill()
    assert [runner.exitcode for runner in runners] == [-9, 0, 0]
    printed = [line for runner in runners for line in Path(f"{runner.pid}.out").read_text().split()]
    assert len(printed) == len(set(printed)) >= count - 1  # the killed one may have saved one and not told
    names = sorted(pictures())
    assert names == sorted(f"cat-number-{n}_seed_{n}.png" for n in range(count))
    assert [row["status"] for row in manifest()] == ["done"] * count
    assert {row["file"] for row in manifest()} == set(names)
    assert all(read(Path("out", f"cat-number-{n}_seed_{n}.png")).prompt == f"cat number {n}" for n in range(count))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x", "--engine", "ray"], "--engine ray draws a --prompt-file into a directory"),
        (["--prompt-file", "p.jsonl", "-o", "out/", "--engine", "rey"], "unknown engine 'rey', did you mean 'ray'?"),
        (["--prompt-file", "p.jsonl", "-o", "out/", "--workers", "2"], "--workers 2 needs --engine ray"),
        (["--prompt-file", "p.jsonl", "-o", "out/", "--timeline", "t.json"], "--timeline is of one picture"),
        (["--prompt-file", "p.jsonl", "-o", "no/out/"], "output directory 'no' does not exist"),
    ],
)
def test_what_does_not_go_together(cli, arguments: list[str], message: str) -> None:
    job(*LINES)
    done = cli("generate", *arguments)
    assert done.code in (1, 2)
    assert message in done.err
    assert [path.name for path in Path.cwd().iterdir()] == ["p.jsonl"]


def test_null_in_a_line_means_not_given(tmp_path: Path) -> None:
    """What a line leaves out comes from the flags."""
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "steps": null, "seed": null, "width": null}\n{"prompt": "a"}')
    null, left_out = wanted.listed([], tmp_path / "p.jsonl", {"steps": 7}, [], 1)
    assert null.sampling == left_out.sampling
    assert null.sampling.steps == 7
