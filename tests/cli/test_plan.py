"""`fastdiff plan`: what is measured, counted and predicted is named so; exit 1 where nothing helps."""

from __future__ import annotations

import json

import pytest

from fastdiff.cli.plan import _tell
from fastdiff.parallel import REGISTRY
from fastdiff.parallel.planner import Plan, Prediction

CACHES = ("--cache", "deepcache", "--cache", "pab")


def test_json_and_recommendation(cli, model: str) -> None:
    done = cli("plan", "-m", model, "--devices", 2, "--link", 100, "--size", 128, "--steps", 6, "--json", *CACHES)
    assert done.code in (0, 1), done.err  # which of them is faster on so small a model is not known
    found = json.loads(done.out)
    assert (found["devices"], found["link_gb_per_second"], found["size"], found["steps"]) == (2, 100, 128, 6)
    assert found["measured_one_device_step_seconds"] > 0 and "predictions" in found["note"]
    held = found["cache_bytes"]
    assert list(held) == ["deepcache", "pab"] and 0 < held["deepcache"] < held["pab"]
    rows = {row["method"]: row for row in found["methods"]}
    assert set(rows) == set(REGISTRY)
    assert rows["patch"]["counted_kinds"].keys() == {"kv", "halo", "norm", "output"}
    assert "cannot split" in rows["ulysses"]["refused"] and "predicted_seconds" not in rows["ulysses"]
    free = [row for row in found["methods"] if "refused" not in row]
    best = min(free, key=lambda row: row["predicted_seconds"])["settings"] if free else None
    assert found["recommended"] == best


def test_nothing_helps_on_a_slow_link(cli, model: str) -> None:
    done = cli("plan", "-m", model, "--devices", 2, "--link", 1e-6, "--latency", 1e6, "--size", 128, "--steps", 6)
    assert done.code == 1
    assert "no parallel method is predicted to fit and to be faster than one device" in done.err
    assert done.out.count("predicted slower than one device") == 7 + 3  # of which in halves
    assert "measured" in done.out and "counted" in done.out and "predicted" in done.out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--devices", 1, "--link", 1), "--devices"),
        (("--devices", 2, "--link", 0), "--link 0"),
        (("--devices", 2, "--link", "nan"), "--link nan"),
        (("--devices", 2, "--link", 1, "--memory", -1), "--memory -1"),
        (("--devices", 2, "--link", 1, "--codec", "zip"), "zip"),
        (("--devices", 2), "--link"),
        (("--devices", 2, "--link", 1, "--size", 63), "divisible by 8"),
        (("--devices", 2, "--link", 1, "-m", "no-such-model"), "no-such-model"),
    ],
)
def test_bad_input(cli, model: str, arguments: tuple, said: str) -> None:
    own = () if "-m" in arguments else ("-m", model)
    done = cli("plan", *own, *arguments)
    assert done.code == 2 and said in done.err and done.out == ""


def test_the_recommendation_is_a_command_line(capsys) -> None:
    settings = {"method": "patch", "devices": 4, "cfg": 2, "codec": "raw", "halves": True}
    best = Prediction("patch", settings, (2, 1, 2), exact=True)
    _tell(Plan(1.0, 1, [best]), {"model": "a-model", "devices": 4}, False)
    sets = "--set parallel.method=patch --set parallel.cfg=2 --set parallel.halves=true"
    wanted = f"generate PROMPT -m a-model --devices 4 {sets}"
    assert f"recommended, exact: fastdiff {wanted}\n" in capsys.readouterr().err
