"""The same job on a Ray cluster of two workers on this machine, one of which is killed."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from .test_batch import command, job, manifest, pictures

ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'fastdiff[ray]'")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def cluster():
    ray.init(num_cpus=2, include_dashboard=False, logging_level="error", log_to_driver=False)
    yield
    ray.shutdown()


def painters() -> list[int]:
    """Processes that hold a pipeline."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if b"ray::Painter" in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def test_a_worker_that_dies_loses_nothing(cli, model: str) -> None:
    count = 12
    job(*(json.dumps({"prompt": f"cat number {n}", "seed": n, "steps": 20}) for n in range(count)), "{oops")
    killed: list[int] = []

    def kill_one() -> None:
        while not list(Path("out").glob("*.png")):
            time.sleep(0.02)
        killed.extend(painters()[:1])
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill_one, daemon=True)
    killer.start()
    done = cli(*command(model, "--engine", "ray", "--workers", 2))
    killer.join()
    assert killed
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
