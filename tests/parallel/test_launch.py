"""Parallel runs started from the command line, as users start them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastdiff.images import read
from tests.cli.conftest import cli  # noqa: F401
from tests.tiny import make

PATCH = ("--set", "parallel.method=patch")
TALL = ("--steps", "3", "--width", "64", "--height", "128", "--seed", "5")
pytestmark = pytest.mark.xdist_group("ranks")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("models") / "tiny-sd"
    make("sd15").save_pretrained(path)
    return str(path)


def call(folder: Path, *words: str, start: tuple[str, ...] = ("-m", "fastdiff")) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *start, *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
    assert "Traceback" not in done.stderr or start[1] != "fastdiff", done.stderr
    return done


def pixels(path: Path) -> torch.Tensor:
    with Image.open(path) as image:
        return torch.tensor(list(image.convert("RGB").tobytes()), dtype=torch.int16)


@pytest.mark.slow
def test_a_plan_of_layers_that_wait_is_made_and_used(model: str, tmp_path: Path) -> None:
    sets = ("--set", "parallel.method=distrifusion", "--set", "parallel.warmup_steps=0")
    done = call(
        tmp_path, "calibrate", "-m", model, *sets, "--set", "parallel.devices=2", "--set", "parallel.sync_kb=1e6",
        "--steps", "6", "--prompts", "1", "-o", "layers.json", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told == {"file": "layers.json"} | json.loads((tmp_path / "layers.json").read_text())
    found = call(
        tmp_path, "generate", "a cat", "-m", model, *TALL, *sets, "--set", "parallel.plan=layers.json",
        "--devices", "2", "-o", "a.png", "--json",
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    report = json.loads(found.stdout)["report"]
    assert {one["oldest"] for one in report["ranks"]} <= {0, 1} and len(told["layers"]) > 10


def test_ranks_of_our_own_draw_the_picture_of_one(
    cli,  # noqa: F811
    model: str,
) -> None:
    tmp_path = Path.cwd()  # the fixture's
    alone = cli("generate", "a cat", "-m", model, *TALL, "-o", "one.png")
    assert alone.code == 0, alone.err
    two = call(
        tmp_path, "generate", "a cat", "-m", model, *TALL, *PATCH, "--set", "parallel.shard=blocks", "--devices", "2",
        "-o", "two.png", "--json", "--timeline", "trace.json",
    )  # fmt: skip
    assert two.returncode == 0, two.stderr
    assert "[transformers]" not in two.stderr, "it warns of picture processors that nothing here uses"
    assert two.stderr.count("each of 2 ranks will hold") == 1 and "its shares of blocks" in two.stderr
    (line,) = two.stdout.splitlines()  # one rank speaks
    row = json.loads(line)
    assert row["file"] == "two.png" and [one["rank"] for one in row["report"]["ranks"]] == [0, 1]
    assert row["report"]["bytes_sent"] == sum(row["report"]["ranks"][0]["sent"].values()) > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.png", "trace.json", "two.png"]
    assert int((pixels(tmp_path / "one.png") - pixels(tmp_path / "two.png")).abs().max()) <= 1
    assert read(tmp_path / "two.png").config["parallel"]["devices"] == 2
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {(event["pid"], event["cat"]) for event in events} >= {(0, "transfer"), (1, "wait"), (1, "compute")}


@pytest.mark.slow  # that torchrun's children draw is seen in tests/packaging/test_wheel.py, too
def test_torchrun(model: str, tmp_path: Path) -> None:
    run = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "fastdiff")
    words = ("generate", "a cat", "-m", model, "--steps", "2", "--width", "64", "--height", "128", *PATCH)
    done = call(tmp_path, *words, "--set", "parallel.devices=2", "-o", "t.png", start=run)  # seeds are left to chance
    assert done.returncode == 0 and done.stdout.splitlines() == ["t.png"], done.stderr
    wrong = call(tmp_path, *words, "--set", "parallel.devices=3", "-o", "u.png", start=run)
    assert wrong.returncode and "parallel.devices = 3, but 2 processes run; make the numbers equal" in wrong.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["t.png"]


def test_one_process_is_refused_with_the_numbers(
    cli,  # noqa: F811
    model: str,
) -> None:
    done = cli("generate", "a cat", "-m", model, *PATCH, "--set", "parallel.devices=4")
    assert done.code == 2 and list(Path.cwd().iterdir()) == []
    wanted = "parallel.devices = 4, but this is a single process; start 4 with `fastdiff generate --devices 4`"
    assert wanted in done.err
    done = cli("generate", "a cat", "-m", model, *PATCH)
    assert done.code == 2 and "set parallel.devices to 2 or more, or start them with torchrun" in done.err


@pytest.mark.slow  # three processes for a sentence
def test_a_mistake_is_told_once(model: str, tmp_path: Path) -> None:
    done = call(
        tmp_path, "generate", "a cat", "-m", model, "--steps", "2", "--width", "64", "--height", "64", *PATCH,
        "--devices", "2",
    )  # fmt: skip
    assert done.returncode == 1 and done.stderr.count("too few for 2 patch ranks") == 1, done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("parallel.method=pcpp", "parallel.portion=1.5"), "portion"),
        (("parallel.method=patch", "parallel.warmup_steps=-1"), "warmup_steps"),
        (("parallel.method=patch", "parallel.cfg=3"), "cfg"),
        (("parallel.method=parastep", "parallel.cfg=2"), "is no multiple of cfg * step = 2"),
        (("parallel.method=patch", "parallel.timeout=0"), "timeout"),
        (("parallel.method=patch", "parallel.codec=zip"), "codec"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_settings_start_nothing(
    cli,  # noqa: F811
    model: str,
    words: tuple[str, ...],
    reason: str,
) -> None:
    sets = [part for word in words for part in ("--set", word)]
    done = cli("generate", "a cat", "-m", model, *sets, "--devices", "3")
    assert done.code == 2 and reason in done.err


def test_one_device_is_no_parallel_run(
    cli,  # noqa: F811
    model: str,
) -> None:
    done = cli("generate", "a cat", "-m", model, *PATCH, "--devices", "1")
    assert done.code == 2 and "set parallel.devices to 2 or more" in done.err


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ((*PATCH, "--timeline", "t.txt"), "--timeline t.txt: end the name in .json or .png"),
        ((*PATCH, "--timeline", "none/t.json"), "directory 'none' does not exist"),
        (("--timeline", "t.json"), "--timeline shows what ranks do; it needs a parallel method"),
    ],
    ids=str,
)
def test_a_timeline_that_cannot_be_is_refused_before_anything_is_drawn(
    cli,  # noqa: F811
    model: str,
    words: tuple[str, ...],
    reason: str,
) -> None:
    done = cli("generate", "a cat", "-m", model, *words)
    assert done.code == 2 and reason in done.err and list(Path.cwd().iterdir()) == []


def test_devices_need_a_method(
    cli,  # noqa: F811
    model: str,
) -> None:
    done = cli("generate", "a cat", "-m", model, "--devices", "2")
    assert (
        done.code == 2 and "--devices 2 needs --set parallel.method=NAME, one of cfg, patch, distrifusion" in done.err
    )
