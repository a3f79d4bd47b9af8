"""Every bad value gives one clear sentence; layers win in the right order and say where a value came from."""

from __future__ import annotations

import pytest

import fastdiff
from fastdiff.anatomy import Family
from fastdiff.config import Config, layers_of, parse_set, presets, read_file, resolve
from fastdiff.errors import BadConfig, UnknownName

BAD = {
    "unknown key": ({"cach": "deepcache"}, "unknown key in the config: 'cach', did you mean 'cache'"),
    "unknown method": ({"cache": "deepcach"}, "unknown cache method 'deepcach', did you mean 'deepcache'"),
    "unknown method in a table": ({"cache": {"method": "tailor"}}, "unknown cache method 'tailor'"),
    "unknown setting": (
        {"cache": {"method": "deepcache", "intervall": 3}},
        "unknown key in cache: 'intervall', did you mean 'interval'",
    ),
    "setting of another method": (
        {"cache": {"method": "deepcache", "threshold": 0.1}},
        "unknown key in cache: 'threshold'",
    ),
    "unknown predictor": (
        {"cache": {"method": "deepcache", "predictor": "adam_bashforth"}},
        "unknown predictor 'adam_bashforth', did you mean 'adams_bashforth'",
    ),
    "unknown coordinate": ({"cache": {"method": "ab_cache", "coordinate": "time"}}, "cache.coordinate = 'time'"),
    "wrong type": ({"cache": {"method": "deepcache", "interval": "often"}}, "cache.interval = 'often'"),
    "a fraction": ({"cache": {"method": "deepcache", "interval": 2.5}}, "cache.interval = 2.5"),
    "a truth value": ({"cache": {"method": "deepcache", "interval": True}}, "interval = True"),
    "too small": ({"cache": {"method": "deepcache", "interval": 0}}, "cache.interval = 0.*greater than or equal to 1"),
    "negative": ({"cache": {"method": "first_block", "threshold": -1}}, "cache.threshold = -1"),
    "not a number": ({"cache": {"method": "first_block", "threshold": float("nan")}}, "cache.threshold = nan"),
    "infinite": ({"cache": {"method": "first_block", "threshold": float("inf")}}, "cache.threshold = inf"),
    "too large": ({"cache": {"method": "ab_cache", "order": 99}}, "cache.order = 99"),
    "negative step": ({"cache": {"method": "static", "compute_steps": [0, -3]}}, "compute_steps.1 = -3"),
    "no method": ({"cache": {"interval": 3}}, r"\[cache\] needs a `method`"),
    "not a table": ({"cache": 3}, "cache must be a method name or a table with a `method`, got 3"),
    "method is a list": ({"cache": {"method": ["deepcache"]}}, "method"),
    "a list": ({"cache": ["deepcache"]}, "cache must be a method name or a table"),
    "section is no table": ({"compile": 3}, "compile = 3"),
    "unknown compile key": ({"compile": {"enable": True}}, "unknown key in compile: 'enable', did you mean 'enabled'"),
    "unknown compile mode": ({"compile": {"mode": "fastest"}}, "compile.mode = 'fastest'"),
    "unknown attention key": ({"attention": {"backed": "native"}}, "unknown key in attention: 'backed'"),
    "attention is no name": ({"attention": {"backend": 3}}, "attention.backend = 3"),
    "empty room": ({"quant": "w3a3"}, "unknown quant method 'w3a3'"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_value_gives_one_clear_sentence(case):
    values, sentence = BAD[case]
    with pytest.raises(BadConfig, match=sentence) as error:
        Config(**values)
    told = str(error.value)
    assert "\n" not in told and "pydantic" not in told and "Traceback" not in told
    with pytest.raises(BadConfig, match=sentence):
        resolve(layers_of(values))


def test_two_mistakes_are_both_told():
    with pytest.raises(BadConfig, match=r"interval = 0.*; .*'brunch', did you mean 'branch'"):
        Config(cache={"method": "deepcache", "interval": 0, "brunch": 1})


def test_an_unknown_preset_gets_a_suggestion():
    with pytest.raises(UnknownName, match="unknown preset 'balancd', did you mean 'balanced'"):
        layers_of("balancd")
    with pytest.raises(UnknownName, match="unknown preset 'balancd'"):
        layers_of({"preset": "balancd"})
    with pytest.raises(BadConfig, match="preset must be a name or a path, got 3"):
        layers_of({"preset": 3})


FILES = {
    "missing": (None, ".toml", "does not exist"),
    "toml syntax": ("[cache\nmethod = 3", ".toml", "cannot be read"),
    "json syntax": ('{"cache": ', ".json", "cannot be read"),
    "json list": ("[1, 2]", ".json", "must be a table of keys and values, got list"),
    "not text": (b"\xff\xfe\x00", ".toml", "cannot be read"),
    "itself": ('preset = "given.toml"', ".toml", "builds on itself: given.toml -> given.toml"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_bad_file_gives_one_clear_sentence(tmp_path, case):
    content, suffix, sentence = FILES[case]
    file = tmp_path / f"given{suffix}"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(BadConfig, match=sentence) as error:
        resolve(layers_of(file))
    assert "\n" not in str(error.value)


def test_files_that_build_on_each_other_in_a_circle_are_refused(tmp_path):
    (tmp_path / "a.toml").write_text('preset = "b.toml"')
    (tmp_path / "b.toml").write_text('preset = "a.toml"')
    with pytest.raises(BadConfig, match="itself"):
        layers_of(tmp_path / "a.toml")


def test_a_file_builds_on_another_file_next_to_it(tmp_path, monkeypatch):
    (tmp_path / "base.toml").write_text('[cache]\nmethod = "deepcache"\ninterval = 5\nbranch = 1')
    (tmp_path / "mine.toml").write_text('preset = "base.toml"\n[cache]\ninterval = 4')
    monkeypatch.chdir("/")
    found = resolve(layers_of(tmp_path / "mine.toml"))
    assert (found.config.cache.interval, found.config.cache.branch) == (4, 1)
    assert found.origins["cache.interval"] == "file mine.toml" and found.origins["cache.branch"] == "file base.toml"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cache.interval=3", {"cache": {"interval": 3}}),
        ("cache.threshold = 0.5", {"cache": {"threshold": 0.5}}),
        ("compile.enabled=true", {"compile": {"enabled": True}}),
        ("cache.compute_steps=[0, 3]", {"cache": {"compute_steps": [0, 3]}}),
        ("cache=deepcache", {"cache": "deepcache"}),
        ("attention.backend=a=b", {"attention": {"backend": "a=b"}}),
    ],
)
def test_assignments(text, expected):
    assert parse_set(text) == expected


@pytest.mark.parametrize("text", ["cache.interval", "=3", "cache..interval=3", "cache interval=3", "", "1a=3"])
def test_an_assignment_that_means_nothing_is_refused(text):
    with pytest.raises(BadConfig, match=r"--set takes section\.key=value"):
        parse_set(text)


FAMILY = Family("tiny", "unet", defaults={"deepcache": {"interval": 2, "branch": 1, "warmup_steps": 7}})


def test_each_layer_wins_over_the_weaker_ones_and_says_so(tmp_path):
    """Family default < preset < file < --set < flag."""
    preset = (
        "preset p",
        {"cache": {"method": "deepcache", "interval": 3, "branch": 2, "order": 3, "cooldown_steps": 1}},
    )
    file = ("file f", {"cache": {"interval": 4, "branch": 3, "order": 4}})
    assignment = ("--set", parse_set("cache.interval=5") | {})
    flag = ("--flag", {"cache": {"interval": 6}})
    found = resolve([preset, file, ("--set", parse_set("cache.branch=4")), assignment, flag], FAMILY)
    cache = found.config.cache
    assert (cache.interval, cache.branch, cache.order, cache.cooldown_steps, cache.warmup_steps) == (6, 4, 4, 1, 7)
    assert found.origins == {
        "cache.interval": "--flag",
        "cache.branch": "--set",
        "cache.order": "file f",
        "cache.cooldown_steps": "preset p",
        "cache.method": "preset p",
        "cache.warmup_steps": "family default (tiny)",
    }


def test_another_method_drops_the_settings_of_the_weaker_one():
    weak = ("preset p", {"cache": {"method": "deepcache", "interval": 3, "branch": 2}})
    for value in ("ab_cache", {"method": "ab_cache"}):
        found = resolve([weak, ("--set", {"cache": value})], FAMILY)
        assert found.config.cache.method == "ab_cache" and found.config.cache.interval == 2
        assert found.origins == {"cache.method": "--set"}


def test_the_same_method_again_keeps_the_settings():
    weak = ("preset p", {"cache": {"method": "deepcache", "interval": 3}})
    found = resolve([weak, ("--set", {"cache": "deepcache"})])
    assert found.config.cache.interval == 3


def test_family_tables_apply_where_they_match_the_most_special_last():
    layer = {
        "cache": {"method": "deepcache", "interval": 2},
        "family": {
            "shapes-unet": {"cache": {"interval": 5}},
            "tiny": {"cache": {"interval": 4, "branch": 2}},
            "unet": {"cache": {"interval": 3, "branch": 1, "order": 3}},
            "transformer": {"cache": {"method": "first_block"}},
        },
    }
    found = resolve([("preset p", layer)], FAMILY, "shapes-unet")
    assert (found.config.cache.interval, found.config.cache.branch, found.config.cache.order) == (5, 2, 3)
    assert found.origins["cache.interval"] == "preset p (shapes-unet)"
    assert resolve([("preset p", layer)], Family("sd3", "transformer")).config.cache.method == "first_block"


def test_a_resolved_config_is_not_changed_by_family_defaults_again():
    """It is what a PNG carries; replaying it must give the same picture."""
    for value in (None, 3):
        family = Family("tiny", "unet", defaults={"deepcache": {"max_consecutive_cached": 2}})
        config = Config(cache={"method": "deepcache", "max_consecutive_cached": value})
        assert resolve(layers_of(config), family).config == config


def test_layers_do_not_change_what_the_caller_gave():
    given = {"preset": "fast", "cache": {"method": "deepcache", "interval": 3}}
    resolve([*layers_of(given), ("--set", {"cache": {"interval": 9}})], FAMILY)
    assert given == {"preset": "fast", "cache": {"method": "deepcache", "interval": 3}}


def test_configs_are_frozen_and_compare_by_value():
    config = Config(cache={"method": "deepcache"})
    assert config == Config(cache="deepcache") != Config(cache={"method": "deepcache", "interval": 9})
    with pytest.raises(ValueError, match="frozen"):
        config.cache = None
    with pytest.raises(ValueError, match="frozen"):
        config.cache.interval = 1


@pytest.mark.parametrize("text", ["", "{", "[1]", "3", '{"cache": "nothing"}'])
def test_json_that_is_no_config_is_refused(text):
    with pytest.raises(BadConfig):
        Config.from_json(text)


def test_the_presets_are_there_and_lossless_enables_nothing_lossy():
    assert set(presets()) >= {"lossless", "balanced", "fast"}
    assert all(read_file(path)["description"] for path in presets().values())
    assert resolve(layers_of("lossless")).config == Config(text={"cache": True, "keys": True})
    assert fastdiff.Config is Config
