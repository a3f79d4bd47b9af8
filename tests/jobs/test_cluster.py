"""The same job on a Ray cluster of two workers on this machine, one of which is killed."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from tests.clusters import running

from .test_batch import command, job, manifest, pictures

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cluster")]


def test_a_worker_that_dies_loses_nothing(cli, model: str, monkeypatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")  # unlike the cluster: workers get what holds here
    count = 12
    job(*(json.dumps({"prompt": f"cat number {n}", "seed": n, "steps": 20}) for n in range(count)), "{oops")
    killed: list[int] = []
    environments: list[str] = []

    def kill_one() -> None:
        while not list(Path("out").glob("*.png")):
            time.sleep(0.02)
        painters = running("Painter")
        environments.extend(painters.values())
        killed.extend(list(painters)[:1])
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill_one, daemon=True)
    killer.start()
    done = cli(*command(model, "--engine", "ray", "--workers", 2))
    killer.join()
    assert killed
    assert all("OMP_WAIT_POLICY=ACTIVE" in environment for environment in environments)
    assert "2 workers on Ray, a CPU each" in done.err
    assert (done.code, len(done.files)) == (1, count), done  # 1: a line of the file was refused
    assert "p.jsonl line 13: not JSON" in done.err
    assert [row["status"] for row in manifest()] == [*["done"] * count, "refused"]
    ours = pictures()
    for name in ("cat-number-0_seed_0.png", "cat-number-11_seed_11.png"):
        Path("out", name).unlink()
    job(*(json.dumps({"prompt": f"cat number {n}", "seed": n, "steps": 20}) for n in range(count)))
    again = cli(*command(model, "--no-metadata"))  # here, what is missing
    assert len(again.files) == 2
    from PIL import Image

    for name in ("cat-number-0_seed_0.png", "cat-number-11_seed_11.png"):
        Path("before.png").write_bytes(ours[name])
        assert Image.open("before.png").tobytes() == Image.open(Path("out", name)).tobytes()


def test_a_model_that_cannot_be_loaded_ends_it(cli, tmp_path: Path, model: str) -> None:
    job('{"prompt": "a cat"}')
    done = cli("generate", "--prompt-file", "p.jsonl", "-o", "out/", "--engine", "ray", "-m", str(tmp_path / "none"))
    assert done.code == 1
    assert "does not exist" in done.err
    assert "3 workers need a CPU each" in cli(*command(model, "--engine", "ray", "--workers", 3)).err
