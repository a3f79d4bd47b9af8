"""The second tab: benchmarks of a folder, newest first; files that are none are left out."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

pytest.importorskip("gradio", reason="the demo needs gradio: pip install 'fastdiff[demo]'")

from fastdiff.demo.results import benchmarks, pareto
from fastdiff.errors import FastdiffError

REAL = Path(__file__).resolve().parents[2] / "benchmarks" / "shapes-unet.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for age, name in ((100, "old.json"), (1, "new.json")):
        shutil.copy(REAL, tmp_path / name)
        os.utime(tmp_path / name, (1_700_000_000 - age,) * 2)
    rows = json.loads(REAL.read_text(encoding="utf-8"))
    bad = {
        "broken.json": "[{", "number.json": "3", "empty.json": "[]", "deep.json": "[" * 100_000, "text.txt": "x",
        "other.json": '[{"name": "x"}]', "no-baseline.json": json.dumps(rows[1:2]), "null.json": "null",
    }  # fmt: skip
    for name, text in bad.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "binary.json").write_bytes(b"\xff\x00")
    (tmp_path / "folder.json").mkdir()
    return tmp_path


def test_the_newest_is_first_and_others_are_left_out(folder):
    assert benchmarks(folder) == ["new.json", "old.json"]
    assert benchmarks(folder / "old.json") == ["old.json"]
    assert benchmarks(folder / "broken.json") == benchmarks(folder / "nowhere") == []


def test_picture_and_table(folder):
    picture, table = pareto(folder, None)
    assert picture.width > 600 and "| baseline |" in table
    assert pareto(folder / "old.json", "old.json")[1] == table


@pytest.mark.parametrize("name", ["broken.json", "../new.json", "/etc/passwd", "", "\x00", "x" * 100_000])
def test_only_what_is_listed_is_read(folder, name):
    with pytest.raises(FastdiffError, match="is not there") as caught:
        pareto(folder, name)
    assert len(str(caught.value)) < 300


def test_no_benchmark_yet(tmp_path):
    with pytest.raises(FastdiffError, match="no benchmark yet"):
        pareto(tmp_path, None)
