"""Fields of the page are made from the schemas of all methods, and what they hold becomes a config again."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("gradio", reason="the demo needs gradio: pip install 'fastdiff[demo]'")

from fastdiff.config import METHOD_KINDS, Attention, Compile, Config, resolve
from fastdiff.demo.fields import settings_of
from fastdiff.demo.order import Ground
from fastdiff.errors import FastdiffError
from fastdiff.registry import names, registry

METHODS = [(kind, name) for kind, known in names().items() for name in known]


@pytest.mark.parametrize(("kind", "name"), METHODS)
def test_every_method_has_fields_that_give_its_defaults_back(kind, name):
    """Whatever is registered shows up by itself; a method with required settings shows them empty."""
    ground = Ground("lossless", "shapes-unet")
    values = ground.values(kind, name)
    settings = settings_of(registry(kind)[name], values, {"method"})
    fields = registry(kind)[name].model_fields
    assert {s.name for s in settings} <= fields.keys() - {"method"} and settings
    entered = {}
    for setting in settings:
        part = setting.component(kind, f"{name}/{setting.name}")
        assert part.label == setting.label and part.elem_id == f"{kind}-{setting.name}"
        assert fields[setting.name].description is None or fields[setting.name].description in part.info
        entered[setting.name] = setting.parsed(part.value)
    levers = {other: name if other == kind else None for other in METHOD_KINDS}
    choice = ground.chosen(levers, {kind: entered})
    assert choice == {"preset": "lossless", kind: {"method": name}}, "what nobody changed is not said"


@pytest.mark.parametrize("model", [Attention, Compile])
def test_so_have_the_other_sections(model):
    values = json.loads(model().model_dump_json())
    for setting in settings_of(model, values):
        assert setting.parsed(setting.component("x", setting.name).value) == values[setting.name]


def test_ranges_and_kinds():
    values = Ground("balanced", "shapes-dit").values("cache", "ab_cache")
    found = {s.name: s for s in settings_of(registry("cache")["ab_cache"], values)}
    assert (found["order"].entry, found["order"].low, found["order"].high) == ("range", 1, 6)
    assert found["interval"].entry == "number" and found["interval"].value == 2, "the preset's value"
    assert found["predictor"].entry == "choice" and "adams_bashforth" in found["predictor"].choices
    assert "at least 1" in found["max_consecutive_cached"].info and found["max_consecutive_cached"].parsed(None) is None
    assert "method" not in found


@pytest.mark.parametrize(
    ("levers", "entered", "choice"),
    [
        ({"cache": "ab_cache"}, {"cache": {"interval": 2}}, {}),
        ({"cache": "ab_cache"}, {"cache": {"interval": 5}}, {"cache": {"method": "ab_cache", "interval": 5}}),
        ({"cache": None}, {}, {"cache": None}),
        ({"cache": "fora"}, {}, {"cache": {"method": "fora"}}),
        ({"cache": "ab_cache"}, {"compile": {"enabled": True}}, {"compile": {"enabled": True}}),
        ({"cache": "ab_cache"}, {"compile": {"enabled": False}}, {}),
    ],
)
def test_a_config_says_only_what_differs_from_the_preset(levers, entered, choice):
    made = Ground("balanced", "shapes-unet").chosen({"parallel": None, "quant": None} | levers, entered)
    assert made == {"preset": "balanced", **choice}


def test_defaults_of_the_family_are_shown():
    bare = resolve([("page", {"cache": {"method": "deepcache"}})]).config.cache
    on_model = Ground("lossless", "shapes-unet").values("cache", "deepcache")
    assert Config(cache=on_model).cache.regions  # a whole, valid method
    assert on_model.keys() == bare.model_dump().keys()


@pytest.mark.parametrize("raw", ["[" * 100_000, "\x00", "\ud800", "1e999", "{}", "x" * 100_000, "-1", "true", "[1, 2]"])
def test_text_that_makes_no_sense_is_refused_by_the_config(raw):
    ground = Ground("lossless", "shapes-unet")
    setting = next(s for s in settings_of(registry("cache")["teacache"], {}) if s.name == "coefficients")
    levers = {"cache": "teacache", "parallel": None, "quant": None}
    choice = ground.chosen(levers, {"cache": {"coefficients": setting.parsed(raw)}})
    if raw == "[1, 2]":
        assert ground.config(choice | {"cache": choice["cache"]}).cache.coefficients == (1, 2)
    else:
        with pytest.raises(FastdiffError, match="coefficients"):
            ground.config(choice)
