"""The script for a card, rehearsed on a CPU: every section runs, and what fails in one is told and not raised."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import fastdiff
from tests import tiny

ROOT = Path(__file__).parents[2]
TITLES = ["the card", "gates", "compile gate", "waits for NCCL", "layers", "SDXL", "FLUX"]


def rehearsed(tmp_path: Path, *options: str) -> dict:
    file = tmp_path / "found.json"
    script = [sys.executable, str(ROOT / "scripts/bench_gpu.py"), "--dry-run", "-o", str(file), *options]
    done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout) <= 12_001
    return json.loads(file.read_text())


def failed(found: dict) -> list[dict]:
    rows = [row for section in found["sections"].values() for row in section["rows"]]
    return [row for row in rows if "failed" in row or row.get("passed") is False]


def test_the_gates_open_on_a_cpu(tmp_path):
    found = rehearsed(tmp_path, "--sections", "0,1,3")
    assert list(found["sections"]) == ["the card", "gates", "waits for NCCL"]
    assert all(section["state"] == "complete" for section in found["sections"].values())
    assert not failed(found)
    gates = found["sections"]["gates"]["rows"]
    assert {row["name"].split()[0] for row in gates} >= {"format", "kernel", "static"}
    assert all(row["passed"] for row in gates if "skipped" not in row)


@pytest.mark.slow
def test_all_sections_run(tmp_path):
    found = rehearsed(tmp_path)
    assert list(found["sections"]) == TITLES
    assert all(section["state"] == "complete" for section in found["sections"].values())
    assert not failed(found)
    sdxl = {row["name"]: row for row in found["sections"]["SDXL"]["rows"]}
    assert sdxl["sdxl deepcache"]["cached"] == 8 and sdxl["sdxl eager"]["cached"] == 0
    assert sdxl["sdxl deepcache"]["cached_step_ms"] < sdxl["sdxl deepcache"]["computed_step_ms"]
    assert sdxl["sdxl deepcache"]["cache_mb"] > 0 and sdxl["sdxl deepcache"]["saved_ms"] > 0
    flux = {row["name"] for row in found["sections"]["FLUX"]["rows"]}
    assert {"flux w4a16 smallest", "flux rival torchao fp8 compiled"} <= flux


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
def test_the_gates_open_on_this_card(tmp_path):
    file = tmp_path / "found.json"
    script = [sys.executable, str(ROOT / "scripts/bench_gpu.py"), "--sections", "0,1,2,3", "-o", str(file)]
    done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0 and not failed(json.loads(file.read_text())), done.stdout + done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
def test_floats_of_a_reversible_quantization_wait_on_the_cpu():
    pipe = tiny.make("sd3").to("cuda")
    before = {name: p.clone() for name, p in pipe.transformer.named_parameters()}
    held = torch.cuda.memory_allocated()
    with fastdiff.accelerate(pipe, quant={"method": "w8a16", "speed": "smallest"}):
        assert torch.cuda.memory_allocated() < held
    assert all(p.is_cuda and torch.equal(p, before[name]) for name, p in pipe.transformer.named_parameters())


@pytest.mark.parametrize(
    ("wheel", "taken"),
    [
        ("torch-0.1-cp39-cp39-linux_x86_64.whl", []),  # what is here and not older stays, whatever its wheel is for
        ("torch-999.0-py3-none-any.whl", ["torch"]),
        ("nobody_has_this-1.0-py2.py3-none-any.whl", ["nobody_has_this"]),
        ("nobody_has_this-1.0-cp310-abi3-linux_x86_64.whl", ["nobody_has_this"]),
        ("nobody_has_this-1.0-cp39-cp39-linux_x86_64.whl", None),
    ],
)
def test_of_the_kit_is_taken_what_is_lacking_and_fits(wheel, taken, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from gpu.kit import unpack

    (tmp_path / "kit").mkdir()
    with zipfile.ZipFile(tmp_path / "kit" / wheel, "w") as file:
        file.writestr("something.py", "")
    if taken is None:
        with pytest.raises(SystemExit, match=r"is not for Python .*KIT_PYTHON="):
            unpack(tmp_path / "kit", tmp_path / "here")
        return
    assert unpack(tmp_path / "kit", tmp_path / "here") == taken
    assert (tmp_path / "here" / "something.py").is_file() is bool(taken)
