"""Tuning: the choice is what was asked for, what is written runs, and a search goes on where it ended."""

import importlib.util
import json
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest

import fastdiff
from fastdiff.bench import tune
from fastdiff.bench.measure import draw
from fastdiff.bench.plan import Settings
from fastdiff.bench.prompts import Prompts
from fastdiff.bench.tune import Goal, Tried, Tuning
from fastdiff.config import Config, layers_of
from fastdiff.errors import BadConfig
from tests.packaging.tree import ROOT
from tests.tiny import arguments, make

TEXTS = tuple(f"a {colour} cat" for colour in ("red", "blue", "green", "old", "small", "large", "wet", "dry"))


def tried(name, speedup, decibels):
    return Tried(name, 1 / speedup, speedup, [decibels, decibels])


FOUND = [tried("slow", 2.0, 50.0), tried("middle", 4.0, 41.0), tried("quick", 5.0, 39.0), tried("poor", 9.0, 20.0)]


@pytest.mark.parametrize(
    ("goal", "best", "order"),
    [
        (Goal("psnr", 40), "middle", ["middle", "slow", "quick", "poor"]),
        (Goal("speedup", 4.5), "quick", ["quick", "poor", "middle", "slow"]),
        (Goal("seconds", 0.3), "middle", ["middle", "quick", "poor", "slow"]),
        (Goal("psnr", 60), None, ["slow", "middle", "quick", "poor"]),
    ],
)
def test_the_choice(goal, best, order):
    chosen = goal.best(FOUND)
    assert (chosen.name if chosen else None) == best
    assert [one.name for one in goal.nearest(FOUND)] == order


def test_a_quality_is_met_with_a_margin_for_other_prompts():
    goal = Goal("psnr", 40)
    assert goal.met(Tried("even", 1, 1, [40.5] * 4)) and not goal.met(Tried("uneven", 1, 1, [30.0, 51.0, 30.0, 51.0]))
    assert Tried("x", 1, 1, [39.0, 40.0, 41.0, 42.0]).kept(40) == 0.75
    uneven = tried("quick but uneven", 9.0, 41.0), Tried("slow", 1, 1, [38.0, 46.0])
    assert [goal.nearest(uneven, prompts)[0].name for prompts in (1, 100)] == ["quick but uneven"] * 2
    assert goal.miss(uneven[1], 1) > 0 > goal.miss(uneven[1], 1000), "more prompts leave less to chance"


def test_what_just_met_it_is_kept_by_as_many_other_prompts_19_times_of_20():
    drawn = np.random.default_rng(0).normal(40, 7, (20_000, 2, 12))
    kept = []
    for seen, others in drawn:
        found = Tried("x", 1, 1, seen.tolist())
        met = found.mean - found.spread(12) * (2 / 12) ** 0.5  # the highest quality that it meets
        assert abs(Goal("psnr", met).miss(found, 12)) < 1e-9
        kept.append(others.mean() >= met)
    assert 0.94 < np.mean(kept) < 0.96


def test_where_the_most_promising_do_not_keep_it_the_next_are_drawn(tmp_path, monkeypatch):
    found = search(None, tmp_path / "x.json", Goal("psnr", 40), said := [])
    found.configs = {f"solver {n}": Config() for n in range(10)}
    found.screened = [tried(name, 10.0 - n, 41.0) for n, name in enumerate(found.configs)]
    monkeypatch.setattr(Tuning, "_candidates", lambda self, ends: iter(()))
    asked = []

    def measured(self, configs, prompts, rounds):
        asked.extend(configs)
        kept = {one: 41.0 if one >= "solver 5" else 39.0 for one in configs}
        speed = {one: 3.0 if one.endswith("5 compiled") else 2.0 for one in configs}
        return [tried("baseline", 1.0, 44.0), *(tried(one, speed[one], decibels) for one, decibels in kept.items())]

    monkeypatch.setattr(Tuning, "_measure", measured)
    every, chosen = found.search()
    besides = ["solver 5", "solver 5 w8a8", "solver 5 compiled", "solver 5 w8a8 compiled"]
    assert asked == [f"solver {n}" for n in range(8)] + besides
    assert chosen.name == "solver 5 compiled" and found.configs[chosen.name].compile.enabled
    assert sorted(one.name for one in every) == sorted({"baseline", *asked}), "each once"
    assert len(said) == 3


@pytest.mark.parametrize(("to", "solvers", "plans"), [("converged", 6, 0), ("plain", 3, 2)])
def test_caches_have_what_solvers_leave_and_half_the_time_at_least(tmp_path, monkeypatch, to, solvers, plans):
    """Five minutes, in which each plan takes one."""
    now = [0]
    monkeypatch.setattr(tune, "time", SimpleNamespace(monotonic=lambda: 60 * now[0]))

    def fitted(*args, **kwargs):
        now[0] += 1
        return SimpleNamespace(summary=str)

    monkeypatch.setattr(tune, "fitting", lambda *args, **call: nullcontext(SimpleNamespace(plan=fitted)))
    monkeypatch.setattr(tune, "calibrate", fitted)
    monkeypatch.setattr(tune, "Config", dict)
    found = search(None, tmp_path / "x.json", Goal("psnr", 40, to), [])
    found.settings = found.settings.model_copy(update={"steps": 50})
    for name, config in found._candidates(ends=5 * 60):
        found.configs[name] = config
    assert [sum(name.startswith(kind) for name in found.configs) for kind in ("solver", "dp")] == [solvers, plans]


def search(pipe, file, goal, said):
    settings = Settings(steps=6, rounds=1, guidance_scale=4.0, batch=4, converged_steps=20)
    return Tuning(pipe, goal, settings, Prompts(TEXTS[:4]), TEXTS, file, 5.0, said.append)


pytestmark = pytest.mark.xdist_group("tune")  # the search is made once


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A whole search on a tiny pipeline, for speed, and what came of it."""
    file, said = tmp_path_factory.mktemp("tune") / "x.tune.json", []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tune, "EVALUATIONS", (2, 3))
        patch.setattr(tune, "SHARES", (0.5,))
        made = search(make("sd3"), file, Goal("speedup", 0.01, "plain"), said)
        yield made, *made.search()


@pytest.mark.slow
def test_a_search_measures_and_chooses(first):
    made, measured, chosen = first
    assert {"solver 2", "solver 3", "dp 3"} <= set(made.configs) and chosen.name in made.configs
    names = {one.name for one in measured}
    assert "baseline" in names and any(name.endswith("w8a8") for name in names)
    assert any(name.endswith(" steps") for name in names), "fewer steps of the stock solver are among what was tried"
    assert all(len(one.decibels) == 4 for one in measured)
    with fastdiff.accelerate(made.pipe, made.configs["solver 3"]) as fast:
        made.pipe(**arguments("sd3"))
        assert fast.report.steps == 3


@pytest.mark.slow
def test_a_search_goes_on_where_it_ended(first, monkeypatch):
    monkeypatch.setattr(tune, "_FINE", 12)
    made, said = first[0], []
    again = search(made.pipe, made.file, Goal("psnr", 1.0, "plain"), said)
    again._resume()
    assert said[0].startswith("going on with") and again.screened == made.screened
    besides = ("w8a8", "compiled")  # are made of the choice, and not kept
    assert {*again.configs} == {name for name in made.configs if not name.endswith(besides)}
    other = search(made.pipe, made.file, Goal("psnr", 1.0, "converged"), said)
    with pytest.raises(BadConfig, match="of another search"):
        other._resume()
    assert not other.configs, "another kind of picture is another search"
    [last] = other._measure({}, Prompts(TEXTS[:2]), 1)[:1]
    assert last.name == "baseline" and 0 < last.mean < 100, "the plain picture is not the converged one"


def test_converged_pictures_are_drawn_once(tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "_FINE", 3)
    made, asked = search(make("sd3"), tmp_path / "x.json", Goal("psnr", 1.0), []), []

    def seen(pipe, texts, seeds, steps, guidance):
        asked.append((texts, seeds, steps))
        return draw(pipe, texts, seeds, steps, guidance)

    monkeypatch.setattr(tune, "draw", seen)
    scheduler = made.pipe.scheduler
    first, more = made._fine(1), made._fine(3)
    assert [(len(texts), steps) for texts, _, steps in asked] == [(1, 3), (2, 3)] and made.pipe.scheduler is scheduler
    assert more.shape == (3, *first.shape[1:]) and (more[:1] == first).all() and not (more[0] == more[1]).all()


def test_what_is_chosen_is_judged_on_captions_that_the_search_never_saw(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("measure_tune", ROOT / "scripts/measure_tune.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert len(script.TRIES) >= 10 and {model for model, *_ in script.TRIES} == {"shapes-unet", "shapes-dit"}
    monkeypatch.setattr(script, "FINE", 6)
    made, drawn = search(make("sd3"), tmp_path / "x.json", Goal("psnr", 1.0), []), []
    made.prompts, made.configs = Prompts(("a lighthouse on a cliff at sunset",)), {"plain": Config()}

    def seen(pipe, texts, seeds, steps, guidance):
        drawn.append((texts, seeds, steps))
        return draw(pipe, texts, seeds, steps, guidance)

    monkeypatch.setattr(script, "draw", seen)
    scheduler = made.pipe.scheduler
    told = script.judged(made.pipe, made, tried("plain", 2.0, 40.0), 2, seed=1)
    assert made.pipe.scheduler is scheduler
    [(texts, seeds, steps), (again, same, asked)] = drawn
    assert (texts, seeds) == (again, same) and (steps, asked) == (6, made.settings.steps) and len(texts) == 2
    assert not {*texts} & {*made.prompts.texts, *made.texts} and min(seeds) > script.UNSEEN
    assert told["chosen"] == "plain" and told["captions"] == 2 and 0 < told["unseen"] < 100


@pytest.mark.slow
@pytest.mark.parametrize("text", ["{", "[]", "\xff", '{"header": 1}'])
def test_a_broken_state_is_refused_in_words(first, tmp_path, text):
    file = tmp_path / "x.tune.json"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(BadConfig, match="cannot be gone on with"):
        search(first[0].pipe, file, Goal("psnr", 1.0, "plain"), [])._resume()


def test_a_lever_without_methods_is_written_too(tmp_path):
    from fastdiff.cli.tune import _toml

    config = Config(compile={"enabled": True}, quant={"method": "w8a8"})
    (tmp_path / "x.toml").write_text("\n".join(_toml(config, tmp_path / "x.toml")), encoding="utf-8")
    [(_, table)] = layers_of(tmp_path / "x.toml")
    assert fastdiff.Config(**table) == config


@pytest.mark.slow
def test_what_is_written_is_a_config_with_its_plan_beside_it(first, tmp_path):
    from fastdiff.cli.tune import _toml

    for name, config in first[0].configs.items():
        file = tmp_path / f"{name.replace(' ', '-')}.toml"
        file.write_text("\n".join(_toml(config, file)), encoding="utf-8")
        [(_, table)] = layers_of(file)
        assert fastdiff.Config(**table) == config, name
    assert json.loads((tmp_path / "solver-3-solver.json").read_text())["evaluations"] == 3


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["-o", "x.toml"], "one goal"),
        (["-o", "x.toml", "--target-psnr", "40", "--seconds", "1"], "one goal"),
        (["-o", "x.json", "--target-psnr", "40"], "must end in .toml"),
        (["-o", "x.toml", "--target-psnr", "40", "--to", "best"], "--to"),
    ],
)
def test_bad_goals_are_refused_at_once(words, said, capsys, tmp_path, monkeypatch):
    from fastdiff.cli import run

    monkeypatch.chdir(tmp_path)
    assert run(["tune", *words]) == 2
    assert said in capsys.readouterr().err and not any(tmp_path.iterdir())
