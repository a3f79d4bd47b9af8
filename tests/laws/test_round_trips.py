"""Law 7: config -> JSON -> config and config -> TOML -> config are equal, and every listing has the same names."""

from __future__ import annotations

import json

import pytest

import fastdiff
from fastdiff.config import layers_of, presets, read_file, resolve
from fastdiff.registry import ROOMS, registry
from tests import tiny
from tests.laws.rows import QUANTIZED_ONCE, ROWS, accelerate

METHODS = [(kind, name) for kind, names in fastdiff.methods().items() for name in names]
DEFAULTS = [
    (kind, name)
    for kind, name in METHODS
    if not any(f.is_required() for f in registry(kind)[name].model_fields.values()) and name != "mixed"
]  # the others are in ROWS, with what they require; mixed requires one of two (tests/quant)


def as_toml(tables: dict[str, dict]) -> str:
    lines = []
    for section, values in tables.items():
        lines += [f"[{section}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]
    return "\n".join(lines)


@pytest.mark.parametrize(("kind", "name"), DEFAULTS)
def test_defaults_of_every_method_survive_json(kind, name):
    config = fastdiff.Config(**{kind: name})
    again = fastdiff.Config.from_json(config.model_dump_json())
    assert again == config and type(getattr(again, kind)) is registry(kind)[name]
    assert fastdiff.Config(**json.loads(config.model_dump_json(exclude_none=True))) == config


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("which", ["neutral", "aggressive"])
def test_settings_survive_json_and_toml(tmp_path, row, which):
    table = getattr(ROWS[row], which)
    config = fastdiff.Config(cache=table)
    assert fastdiff.Config.from_json(config.model_dump_json()) == config
    assert resolve(layers_of(config)).config == config
    (tmp_path / "given.toml").write_text(as_toml({"cache": table}))
    (tmp_path / "given.json").write_text(json.dumps({"cache": table}))
    for file in ("given.toml", "given.json"):
        assert resolve(layers_of(tmp_path / file)).config == config
    for key in table.keys() - {"compute_steps", "plan"}:  # normalised, read
        given = tuple(table[key]) if isinstance(table[key], list) else table[key]
        assert getattr(config.cache, key) == given


@pytest.mark.parametrize("name", presets())
def test_a_preset_survives_json_and_means_the_same_under_its_name(name):
    config = resolve(layers_of(name)).config
    assert fastdiff.Config.from_json(config.model_dump_json()) == config
    assert resolve(layers_of(read_file(presets()[name]))).config == config


@pytest.mark.parametrize("row", [*ROWS, *(row for row, _ in QUANTIZED_ONCE)])
def test_the_config_of_a_handle_makes_the_same_handle_again(row):
    family = ROWS[row].families[0] if row in ROWS else "sd3"
    first = accelerate(tiny.make(family), row)
    second = fastdiff.accelerate(tiny.make(family), fastdiff.Config.from_json(first.config.model_dump_json()))
    assert second.config == first.config


@pytest.mark.parametrize("kind", ROOMS)
def test_a_method_is_registered_under_the_name_it_carries(kind):
    for name, cls in registry(kind).items():
        assert cls.model_fields["method"].default == name
        assert cls.__doc__
        for key in cls.model_fields.keys() - {"method"}:  # a field that only changes a default keeps its meaning
            bases = [base.model_fields[key] for base in cls.__mro__ if key in getattr(base, "model_fields", {})]
            assert any(field.description for field in bases), key
