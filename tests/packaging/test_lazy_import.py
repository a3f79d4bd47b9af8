"""`import fastdiff` and `fastdiff --help` answer at once: nothing heavy is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {"torch", "diffusers", "transformers", "accelerate", "numpy", "pydantic", "PIL", "gradio", "matplotlib"}
COMMAND = Path(sys.executable).with_name("fastdiff")


def imported(*arguments: str) -> set[str]:
    """Top-level packages that a fresh interpreter imports."""
    ran = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments], capture_output=True, text=True, timeout=900, check=False
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    names = [line.rpartition("|")[2].strip() for line in ran.stderr.splitlines() if line.startswith("import time:")]
    return {name.split(".")[0] for name in names}


def test_import_fastdiff():
    found = imported("-c", "import fastdiff; dir(fastdiff); fastdiff.__version__")
    assert "fastdiff" in found
    assert not found & HEAVY


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"], ["bench", "--help"]], ids=" ".join)
def test_help(arguments):
    found = imported(str(COMMAND), *arguments)
    assert not found & (HEAVY - {"pydantic"})


def test_names_of_methods_need_no_torch():
    assert not imported("-c", "import fastdiff; assert fastdiff.methods()['cache']") & {"torch", "diffusers"}
