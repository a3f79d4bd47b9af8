"""Levers together: a covering array of all that work by twos, and the page that says which do."""

from __future__ import annotations

import importlib.util
from itertools import combinations

import pytest

import fastdiff
from fastdiff.caching.methods.faster_diffusion import FasterDiffusion
from fastdiff.caching.methods.joint import Joint
from fastdiff.caching.methods.tgate import TGate
from fastdiff.config import OFF
from fastdiff.errors import BadConfig
from fastdiff.parallel.mesh import Topology
from fastdiff.pipelines.attention import backends
from fastdiff.pipelines.together import check_shared
from tests.coverage.combining import ATTENTION, PIPELINES, WORKS, Combination, Trials, factors, pairs, singles
from tests.coverage.pairwise import covering, met
from tests.coverage.table import QUICK, agreed, expected, outcomes, part, rows, shared
from tests.packaging.tree import ROOT
from tests.parallel import combined
from tests.parallel.asked import Asked

ON_RANKS = Asked(combined, {2: ("covered", "covered_in_full", *PIPELINES)}, {2: ("covered_in_full", *PIPELINES)})
ALONE = [row for row in rows() if not shared(row)]


@pytest.fixture(scope="module")
def trials() -> Trials:
    """Remembers what rows are compared with."""
    return Trials()


@pytest.mark.parametrize(
    "row",
    [pytest.param(row, id=row.label, marks=() if k in QUICK else pytest.mark.slow) for k, row in enumerate(ALONE)],
)
def test_levers_together_hold_the_laws(trials, row):
    assert fits(row, trials.tried(row))


def fits(row: Combination, said: str) -> bool:
    """A row may be refused where two of its values were tried together on another pipeline alone."""
    twos = [Combination(row.pipeline, **dict(two)).label for two in combinations(row.levers.items(), 2)]
    return said == WORKS or (said.startswith("refused: ") and not outcomes().keys() >= {*twos})


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("check", ["covered", pytest.param("covered_in_full", marks=pytest.mark.slow)])
def test_levers_on_two_ranks_hold_the_laws(check):
    one, other = ON_RANKS.told(2, check)
    by_label = {row.label: row for row in rows()}
    assert {label: said for label, said in agreed(one, other).items() if not fits(by_label[label], said)} == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", PIPELINES)
def test_the_table_is_what_runs(trials, name):
    found = dict(part(trials, name, on_ranks=False))
    assert found == {label: said for label, said in of(name).items() if " parallel=" not in label}


@pytest.mark.slow
@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("name", PIPELINES)
def test_the_table_is_what_runs_on_two_ranks(name):
    one, other = ON_RANKS.told(2, name)
    assert agreed(one, other) == {label: said for label, said in of(name).items() if " parallel=" in label}


def of(name: str) -> dict[str, str]:
    """What the committed table says of a pipeline."""
    return {label: said for label, said in outcomes().items() if label.startswith(f"{name} ")}


@pytest.mark.parametrize("name", PIPELINES)
def test_the_table_has_each_two_values_and_nothing_wrong(name):
    told, asked = of(name), [*singles(name), *pairs(name, outcomes())]
    assert told.keys() == {one.label for one in asked}, "run scripts/compatibility.py"
    assert {said for said in told.values() if said != WORKS and not said.startswith("refused: ")} == set()


def test_backends_are_diffusers_own():
    assert set(ATTENTION) <= set(backends())


def test_the_page_is_made_of_the_table():
    spec = importlib.util.spec_from_file_location("compatibility_script", ROOT / "scripts/compatibility.py")
    assert spec and spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    page = script.PAGE.read_text(encoding="utf-8")
    assert page == script.page(outcomes()), "run scripts/compatibility.py --parts"
    assert [name for values in factors().values() for name in values if f"`{name}`" not in page] == []


def test_the_rows_have_every_two_values_that_work_and_no_others():
    seen = [(row.pipeline, dict(two)) for row in rows() for two in combinations(row.levers.items(), 2)]
    assert {expected(name, two) for name, two in seen} == {WORKS}
    asked = [one for name in PIPELINES for one in pairs(name, outcomes()) if outcomes()[one.label] == WORKS]
    assert {frozenset(two.items()) for _, two in seen} == {frozenset(one.levers.items()) for one in asked}
    alone = {one.label for name in PIPELINES for one in singles(name) if outcomes()[one.label] == WORKS}
    assert alone == {
        Combination(row.pipeline, **{kind: one}).label for row in rows() for kind, one in row.levers.items()
    }


def test_a_small_covering_array():
    """Three levers of two values: four rows have all twelve pairs of them, and a refused pair is in none."""
    levers = dict.fromkeys("abc", ("0", "1"))
    whole = covering(levers, {"x": lambda values: True}, OFF)
    assert len(whole) <= 6
    wanted = {frozenset([(one, u), (other, v)]) for one, other in combinations("abc", 2) for u in "01" for v in "01"}
    assert {pair for row in whole for _, pair in met(kinds(row), "x") if len(pair) == 2} == wanted
    apart = frozenset([("a", "0"), ("b", "1")])
    rest = covering(levers, {"x": lambda values: values != apart}, OFF)
    assert {pair for row in rest for _, pair in met(kinds(row), "x") if len(pair) == 2} == wanted - {apart}


@pytest.mark.parametrize(
    ("method", "axes", "said"),
    [
        (TGate(), {"cfg": 2}, 'set cache.guidance = "keep"'),
        (Joint(kinds=("full", "conditional")), {"cfg": 2}, "kinds without conditional"),
        (Joint(kinds=("full", "partial")), {"step": 2}, "parastep gives each rank steps of its own"),
        (FasterDiffusion(), {"patch": 2}, "set cache.max_parallel = 1"),
    ],
    ids=["tgate", "joint", "joint by steps", "faster_diffusion"],
)
def test_what_no_rank_sees_whole_is_refused(method, axes, said):
    """tgate kept guiding without a word where ranks had a half each; joint left nothing out where they had steps each;
    faster_diffusion ended in an IndexError."""
    whole = {"cfg": 1, "step": 1, "patch": 1, "rank": 0}
    with pytest.raises(BadConfig, match=said):
        check_shared(method, Topology(**whole | axes))
    check_shared(method, Topology(**whole))


def test_a_guard_that_needs_all_steps_on_a_rank_is_refused_where_ranks_have_their_own():
    alone, cycle = ({"cfg": 1, "step": step, "patch": 1, "rank": 0} for step in (1, 2))
    method = fastdiff.Config(cache={"method": "ab_cache", "guard": "verify"}).cache
    check_shared(method, Topology(**alone))
    with pytest.raises(BadConfig, match="parastep gives each its own"):
        check_shared(method, Topology(**cycle))


def kinds(row):
    return {kind: value for kind, value in row.items() if kind != "pipeline" and value != OFF}


def test_checks_are_all_run():
    ON_RANKS.all_run()
