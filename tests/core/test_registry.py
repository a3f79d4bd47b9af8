"""Names of methods: tables of the rooms, entry points of other packages, registration while running."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint
from typing import Literal

import pytest

import fastdiff
from fastdiff import registry as module
from fastdiff.caching.base import CacheMethod
from fastdiff.errors import BadConfig, UnknownName
from fastdiff.method import Method
from fastdiff.registry import ROOMS, Registry, names, registry

TABLE = {
    "static": "fastdiff.caching.methods.static:Static",
    "deepcache": "fastdiff.caching.methods.deepcache:DeepCache",
}


class Mine(CacheMethod):
    """A method of somebody else."""

    method: Literal["mine"] = "mine"


def entry(monkeypatch, name: str, value: str, group: str = "fastdiff.cache") -> None:
    point = EntryPoint(name, value, group)
    monkeypatch.setattr(module, "entry_points", lambda group: [point] if group == point.group else [])


def test_every_room_lists_its_names_and_each_is_a_method():
    assert names().keys() == ROOMS.keys() == {"cache", "parallel", "quant", "solver"}
    for kind, listed in fastdiff.methods().items():
        assert len(listed) == len(set(listed))
        assert all(issubclass(registry(kind)[name], Method) for name in listed)


def test_a_method_of_another_package_is_found_through_its_entry_point(monkeypatch):
    entry(monkeypatch, "mine", f"{__name__}:Mine")
    sys.modules.setdefault(__name__, sys.modules[Mine.__module__])
    found = Registry("cache", TABLE)
    assert list(found) == ["static", "deepcache", "mine"] and found["mine"] is Mine


def test_entry_points_of_another_room_are_left_alone(monkeypatch):
    entry(monkeypatch, "mine", f"{__name__}:Mine", group="fastdiff.quant")
    assert "mine" not in Registry("cache", TABLE)


def test_an_entry_point_cannot_take_a_name_that_exists(monkeypatch):
    entry(monkeypatch, "static", "elsewhere:Static")
    with pytest.raises(BadConfig, match="elsewhere:Static registers the cache method 'static', which exists already"):
        Registry("cache", TABLE)


def test_registering_at_run_time_works_once():
    found = Registry("cache", TABLE)
    assert found.register(Mine) is Mine and found["mine"] is Mine and len(found) == 3
    with pytest.raises(BadConfig, match="'mine' exists already"):
        found.register(Mine)


@pytest.mark.parametrize(("wrong", "near"), [("deepcach", "deepcache"), ("statik", "static")])
def test_an_unknown_name_gets_a_suggestion_and_the_list(wrong, near):
    with pytest.raises(UnknownName, match=f"unknown cache method '{wrong}', did you mean '{near}'.*deepcache, static"):
        Registry("cache", TABLE)[wrong]


def test_an_unknown_name_that_is_like_no_other_gets_the_list_alone():
    with pytest.raises(UnknownName) as error:
        Registry("cache", TABLE)["zzz"]
    assert "did you mean" not in str(error.value) and "deepcache, static" in str(error.value)


def test_an_empty_room_says_so():
    with pytest.raises(UnknownName, match="No quant method exists yet"):
        Registry("quant", {})["w8a8"]


def test_an_unknown_kind_is_refused():
    with pytest.raises(UnknownName, match="did you mean 'cache'"):
        registry("cach")


def test_membership_imports_and_raises_nothing():
    found = Registry("cache", {**TABLE, "broken": "no.such.module:Nothing"})
    assert "static" in found and "broken" in found and "w8a8" not in found


@pytest.mark.parametrize("code", ["import fastdiff", "import fastdiff; fastdiff.methods; dir(fastdiff)"])
def test_importing_fastdiff_imports_neither_torch_nor_diffusers(code):
    check = f"import sys; {code}; print([m for m in ('torch', 'diffusers', 'pydantic') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_what_fastdiff_offers_is_what_it_lists():
    assert set(fastdiff.__all__) == set(dir(fastdiff)) and all(hasattr(fastdiff, name) for name in fastdiff.__all__)
    with pytest.raises(AttributeError, match="no attribute 'acelerate'"):
        fastdiff.acelerate  # noqa: B018
