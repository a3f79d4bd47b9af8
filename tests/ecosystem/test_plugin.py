"""Somebody else's package with a method: installed from examples/plugin, found, configured, run."""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.metadata import Distribution, distributions
from pathlib import Path

import pytest

from fastdiff import registry as module
from fastdiff.config import Config
from fastdiff.errors import BadConfig
from fastdiff.registry import Registry

PLUGIN = Path(__file__).resolve().parents[2] / "examples" / "plugin"

PROGRAM = """
import fastdiff
assert "golden" in fastdiff.methods()["cache"]
config = fastdiff.Config(cache={"method": "golden", "ratio": 0.5})
assert fastdiff.Config.from_json(config.model_dump_json()) == config and config.cache.ratio == 0.5
from fastdiff.clock import Run
times = tuple(float(t) for t in range(20, 0, -1))
mask = config.cache.guarded_mask(Run(1, times, times, False), None)
print([i for i, computed in enumerate(mask) if computed])
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A folder with the package in it, installed without network, as `pip install --target` does."""
    copy, target = tmp_path_factory.mktemp("source") / "plugin", tmp_path_factory.mktemp("site")
    shutil.copytree(PLUGIN, copy, ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__"))
    options = ("--no-deps", "--no-index", "--no-build-isolation", "--no-compile", "--quiet")
    command = (sys.executable, "-m", "pip", "install", *options, "--target", str(target), str(copy))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return target


def test_once_installed_it_is_listed_and_configs_name_it(site):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(site)},
        capture_output=True, text=True, check=False, cwd=site,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "[0, 1, 2, 5, 10]"


def test_its_entry_point_is_read_from_what_is_installed(site, monkeypatch):
    found: list[Distribution] = list(distributions(path=[str(site)]))
    points = [point for one in found for point in one.entry_points]
    monkeypatch.setattr(module, "entry_points", lambda group: [p for p in points if p.group == group])
    monkeypatch.syspath_prepend(str(site))
    listed = Registry("cache", {})
    assert list(listed) == ["golden"] and listed["golden"].model_fields["ratio"].default == 0.618
    with pytest.raises(BadConfig, match=r"fastdiff_golden:Golden registers the cache method 'golden', which exists"):
        Registry("cache", {"golden": "mine:Golden"})


def test_without_it_the_name_is_unknown():
    with pytest.raises(BadConfig, match="unknown cache method 'golden'"):
        Config(cache={"method": "golden"})
