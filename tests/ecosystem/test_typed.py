"""The package is typed: mypy finds nothing in it and, made strict, of a program as users write it only its mistakes."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GOOD = """# mypy: disallow-untyped-calls, disallow-untyped-defs, disallow-any-generics, warn-return-any, strict-equality
from pathlib import Path
import fastdiff

pipe = fastdiff.load("shapes-unet")
fast = fastdiff.accelerate(pipe, "balanced", cache={"method": "deepcache", "interval": 3})
with fast as again:
    steps: int = again.report.steps
    seconds: float = again.report.seconds
    said: dict[str, object] = again.report.to_dict()
config: fastdiff.Config = fast.config
fastdiff.accelerate(pipe, Path("my.toml"))
fastdiff.accelerate(pipe, {"preset": "fast"}).restore()
names: dict[str, list[str]] = fastdiff.methods()
register = fastdiff.register_cache
try:
    fastdiff.Config(cache="deepcach")
except fastdiff.FastdiffError as error:
    print(error)
fastdiff.restore(pipe)
reveal_type(fast)
"""
WRONG = {
    "fastdiff.accelerate(pipe, 3)": "arg-type",
    "fast.report.computed()": "operator",
    "fast.restored()": "attr-defined",
    "text: str = fast.report.steps": "assignment",
    "fastdiff.acelerate(pipe)": "attr-defined",
}


pytestmark = pytest.mark.xdist_group("typed")  # mypy takes a minute where nothing was checked before


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> list[str]:
    """What mypy says of the program with the mistakes at its end."""
    folder = tmp_path_factory.mktemp("user")
    program = folder / "program.py"
    program.write_text(GOOD + "\n".join(WRONG) + "\n", encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--no-error-summary", str(program)]  # knows what was checked already
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    return [line for line in done.stdout.splitlines() if "program.py:" in line]


def test_the_package_itself_has_no_mistakes():
    done = subprocess.run([sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_there_is_a_marker():
    spec = importlib.util.find_spec("fastdiff")
    assert spec is not None and spec.origin and Path(spec.origin).with_name("py.typed").is_file()


def test_a_right_program_has_no_mistakes(told):
    lines = len(GOOD.splitlines())
    mine = [line for line in told if int(line.split(":")[1]) <= lines and ": error:" in line]
    assert mine == []
    assert any("fastdiff.pipelines.accelerate.Accelerated" in line for line in told)


@pytest.mark.parametrize(("number", "code"), list(enumerate(WRONG.values())), ids=list(WRONG))
def test_a_mistake_is_found(told, number, code):
    line = len(GOOD.splitlines()) + 1 + number
    assert any(f":{line}: error:" in one and f"[{code}]" in one for one in told), "\n".join(told)
