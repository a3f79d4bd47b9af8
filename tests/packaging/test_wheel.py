"""The wheel and the sdist hold the tree, each file once, and an installed copy works from anywhere."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from pathlib import Path

import pytest

from .tree import HOMES, ROOT, files, installed_path

DATA = ("*.toml", "*.json", "*.safetensors", "*.txt", "*.md", "py.typed")
BESIDE = ("scripts", "tests", "docs", "examples", "requirements", "benchmarks")


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    ran = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={"PATH": "/usr/bin:/bin", "HOME": str(cwd), **environment},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert ran.returncode == 0, (ran.stdout + ran.stderr)[-4000:]
    return ran.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """Folder with an sdist made from a clean copy of the tree, and the wheel made from that sdist."""
    copy = tmp_path_factory.mktemp("tree")
    out = tmp_path_factory.mktemp("dist")
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.partial", ".*_cache")
    for name in (*HOMES, *BESIDE):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignore)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, copy / path.name)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, cwd=copy)
    return out


@pytest.fixture(scope="module")
def wheel(built) -> Path:
    return next(built.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A folder that holds the wheel's files, as `pip install --target` lays them."""
    target = tmp_path_factory.mktemp("site")
    pip = (sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--no-compile", "--quiet")
    run(*pip, "--target", target, wheel, cwd=target)
    return target


def expected() -> list[str]:
    """Paths of all that must be installed."""
    found = []
    for room in HOMES:
        found += [installed_path(path) for path in files(room, "*.py")]
        found += [installed_path(path) for kind in DATA for path in files(room, kind)]
    return sorted(found)


def test_wheel_holds_the_rooms_and_nothing_else(wheel):
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    assert sorted(names) == expected()


def test_sdist_holds_what_a_developer_needs(built):
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        members = [m.name.split("/", 1)[1] for m in archive.getmembers() if m.isfile()]
    assert len(members) == len(set(members))
    needed = [path.as_posix() for name in (*HOMES, "scripts", "tests", "docs", "requirements") for path in files(name)]
    needed += ["pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "Makefile", "MANIFEST.in"]
    assert set(needed) <= set(members)


def test_metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        read = {name.rsplit("/", 1)[-1]: archive.read(name).decode() for name in archive.namelist() if "info/" in name}
    assert "fastdiff = fastdiff.cli:main" in read["entry_points.txt"]
    assert "License-Expression: Apache-2.0" in read["METADATA"]
    assert read["top_level.txt"].split() == ["fastdiff"]
    assert "Apache License" in read["LICENSE"]


def test_installed_copy_works_from_another_directory(installed, tmp_path):
    program = """
        import fastdiff, fastdiff.caching, fastdiff.caching.session, sys
        print(fastdiff.__file__, fastdiff.caching.__file__, sep="\\n")
        assert "caching" not in sys.modules
        assert fastdiff.methods()["cache"]
    """
    out = run(sys.executable, "-c", textwrap.dedent(program), cwd=tmp_path, PYTHONPATH=str(installed))
    assert all(line.startswith(str(installed)) for line in out.split())


CHILDREN = """
    import multiprocessing, pickle, sys

    def child(cls, pipe):
        import fastdiff.caching
        pipe.send((cls.__module__, sys.modules[cls.__module__].__file__, fastdiff.caching.REGISTRY["static"] is cls))

    if __name__ == "__main__":
        import fastdiff.caching
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        process = context.Process(target=child, args=(fastdiff.caching.REGISTRY["static"], there))
        process.start()
        module, file, same = here.recv()
        process.join()
        assert same and module == "fastdiff.caching.methods.static", module
        print(file)
"""


def test_spawned_children_import_it(installed, tmp_path):
    (tmp_path / "program.py").write_text(textwrap.dedent(CHILDREN))
    out = run(sys.executable, "program.py", cwd=tmp_path, PYTHONPATH=str(installed))
    assert out.startswith(str(installed))


@pytest.mark.parametrize(
    "editable", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["as the tests run", "installed"]
)
def test_torchrun_children_import_it(installed, tmp_path, editable):
    tell = "import sys, fastdiff.caching.base\nsys.stdout.write(fastdiff.caching.__file__ + '\\n')\n"
    (tmp_path / "program.py").write_text(tell)  # in one piece: both children write to one pipe
    launch = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "program.py")
    out = run(*launch, cwd=tmp_path, **({} if editable else {"PYTHONPATH": str(installed)}))
    home = ROOT if editable else installed
    assert [line.startswith(str(home)) for line in out.split()] == [True, True]
