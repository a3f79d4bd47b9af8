"""ONE config for every lever, and where each of its values came from.

Layers, weakest first: family default, preset, file or dict, `--set`, dedicated flag. A layer that names another
method drops the fields of the weaker layers' method.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, Field, SerializeAsAny, ValidationError

from .anatomy import Family
from .attention import Attention as Attention
from .errors import BadConfig, UnknownName
from .method import Method, Settings
from .registry import registry

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

METHOD_KINDS = ("cache", "parallel", "quant", "solver")
OFF = "off"  # in the place of a method: none, whatever weaker layers say
# may name a file; in a config file its path is relative to that file
PATH_KEYS = ("plan", "prune", "ranges", "second", "verifier")
Layer: TypeAlias = tuple[str, Mapping[str, Any]]
Source: TypeAlias = "str | Path | Mapping[str, Any] | Config | None"


def _method(kind: str) -> BeforeValidator:
    def resolve(value: Any) -> Any:
        if value is None or isinstance(value, Method):
            return value
        if isinstance(value, str):
            value = {"method": value}
        if not isinstance(value, Mapping):
            raise ValueError(f"{kind} must be a method name or a table with a `method`, got {value!r}")
        if not isinstance(value.get("method"), str):
            raise ValueError(f"[{kind}] needs a `method`; one of {', '.join(registry(kind)) or 'none yet'}")
        try:
            cls = registry(kind)[value["method"]]
        except UnknownName as error:
            raise ValueError(str(error)) from None
        return cls.model_validate(value)  # type: ignore[attr-defined]

    return BeforeValidator(resolve)


class Compile(Settings):
    """torch.compile of the denoiser."""

    enabled: bool = Field(False, description="compile the denoiser")
    scope: Literal["blocks", "denoiser"] = Field(
        "blocks", description="its repeated blocks, or all of it: a graph for computed and one for cached steps"
    )
    backend: str = Field("inductor", description="passed to torch.compile")
    mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = Field(
        "default", description="passed to torch.compile"
    )
    fullgraph: bool = Field(False, description="fail on a graph break instead of splitting")
    dynamic: bool | None = Field(None, description="passed to torch.compile")


class Text(Settings):
    """What depends on the prompt, or on a given picture, alone; nothing here changes a bit."""

    cache: bool = Field(
        False, description="remember, across calls, what text encoders gave, and the VAE of given pictures"
    )
    cache_mb: int = Field(256, ge=1, description="of memory for that; what was used least recently is let go")
    keys: bool = Field(
        False, description="keys and values of a text once a run, where it sees neither time nor picture"
    )


class Config(Settings):
    """What to do to a pipeline. Round-trips through JSON; every PNG carries it."""

    cache: Annotated[SerializeAsAny[Method] | None, _method("cache")] = None
    parallel: Annotated[SerializeAsAny[Method] | None, _method("parallel")] = None
    quant: Annotated[SerializeAsAny[Method] | None, _method("quant")] = None
    solver: Annotated[SerializeAsAny[Method] | None, _method("solver")] = None
    attention: Attention = Attention()
    compile: Compile = Compile()
    text: Text = Text()

    def __init__(self, /, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise BadConfig(_sentence(error, values)) from None

    @classmethod
    def from_json(cls, text: str) -> Config:
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise BadConfig(f"not JSON: {error}") from None
        return cls(**_table(values, "the config"))


@dataclass(frozen=True)
class Resolved:
    """A config and, for each dotted key that some layer set, the name of that layer."""

    config: Config
    origins: Mapping[str, str]


def presets() -> dict[str, Path]:
    """Preset files by name."""
    folder = Path(str(resources.files("fastdiff"))) / "presets"
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def read_file(path: Path) -> dict[str, Any]:
    """A TOML or JSON file as nested tables."""
    if not path.is_file():
        raise BadConfig(f"config file {str(path)!r} does not exist")
    try:
        text = path.read_text(encoding="utf-8")
        return _table(json.loads(text) if path.suffix == ".json" else tomllib.loads(text), str(path))
    except (json.JSONDecodeError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadConfig(f"{path} cannot be read: {error}") from None


def parse_set(assignment: str) -> dict[str, Any]:
    """`cache.interval=3` as a nested table; the value is JSON or TOML-like, anything else is a string."""
    key, equals, text = assignment.partition("=")
    if not equals or not all(part.isidentifier() for part in key.strip().split(".")):
        raise BadConfig(f"--set takes section.key=value, for example cache.interval=3, got {assignment!r}")
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text.strip()
    for part in reversed(key.strip().split(".")):
        value = {part: value}
    return value


def layers_of(source: Source, above: tuple[Path, ...] = ()) -> list[Layer]:
    """The layers that a preset name, a path, a dict or a Config stands for; `above` are the files that build on it."""
    if source is None:
        return []
    if isinstance(source, Config):
        return [("config", {key: value for key, value in source.model_dump().items() if value is not None})]
    if isinstance(source, Mapping):
        return _with_base("dict", dict(source), None, above)
    known = presets()
    if isinstance(source, str) and source in known:
        return [(f"preset {source}", read_file(known[source]))]
    if isinstance(source, Path) or str(source).endswith((".toml", ".json")):
        path = Path(source)
        if path.resolve() in above:
            raise BadConfig(f"{path} builds on itself: " + " -> ".join(file.name for file in (*above, path)))
        values = _anchored(read_file(path), path.parent)
        return _with_base(f"file {path.name}", values, path.parent, (*above, path.resolve()))
    raise UnknownName("preset", source, known)


def _anchored(values: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The table with the paths in it relative to `folder`."""
    found = dict(values)
    for key, value in values.items():
        if isinstance(value, Mapping):
            found[key] = _anchored(value, folder)
        elif key in PATH_KEYS and isinstance(value, str):
            found[key] = str(folder / Path(value).expanduser())
    return found


def _with_base(name: str, values: dict[str, Any], folder: Path | None, above: tuple[Path, ...]) -> list[Layer]:
    """A table may build on a preset or another file through its key `preset`."""
    base = values.pop("preset", None)
    if base is None:
        return [(name, values)]
    if not isinstance(base, str):
        raise BadConfig(f"preset must be a name or a path, got {base!r}")
    if folder is not None and base.endswith((".toml", ".json")):
        return [*layers_of(folder / base, above), (name, values)]
    return [*layers_of(base, above), (name, values)]


def resolve(layers: Sequence[Layer], family: Family | None = None, model: str | None = None) -> Resolved:
    """Merge layers into a Config.

    A layer may hold `family.<name>` tables, which apply where <name> is the kind of denoiser, the family or the
    model's own name (weakest first).
    """
    merged: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for origin, values in layers:
        values = dict(values)
        variants = _table(values.pop("family", {}), "family")
        values.pop("description", None)
        _merge(merged, values, origin, origins)
        names = [n for n in (family.kind, family.name) if n] if family else []
        for name in dict.fromkeys([*names, *([model] if model else [])]):
            _merge(merged, _table(variants.get(name, {}), name), f"{origin} ({name})", origins)
    for kind in METHOD_KINDS:
        _apply_defaults(merged, kind, family, origins)
    return Resolved(Config(**merged), origins)


def _apply_defaults(merged: dict[str, Any], kind: str, family: Family | None, origins: dict[str, str]) -> None:
    table = merged.get(kind)
    if family is None or not isinstance(table, dict):
        return
    for key, value in family.defaults.get(str(table.get("method")), {}).items():
        if key not in table:
            table[key] = value
            origins[f"{kind}.{key}"] = f"family default ({family.name})"


def _merge(into: dict[str, Any], values: Mapping[str, Any], origin: str, origins: dict[str, str]) -> None:
    for key, value in values.items():
        if key in METHOD_KINDS and isinstance(value, str):
            value = None if value == OFF else {"method": value}
        if isinstance(value, Method):
            value = value.model_dump()
        old = into.get(key)
        if isinstance(value, Mapping) and isinstance(old, dict) and _same_method(value, old):
            old.update(value)
            fields = list(value)
        else:
            for name in [n for n in origins if n == key or n.startswith(f"{key}.")]:
                del origins[name]
            into[key] = dict(value) if isinstance(value, Mapping) else value
            fields = list(value) if isinstance(value, Mapping) else []
        for name in fields:
            origins[f"{key}.{name}"] = origin
        if not fields:
            origins[key] = origin


def _same_method(new: Mapping[str, Any], old: Mapping[str, Any]) -> bool:
    return new.get("method", old.get("method")) == old.get("method")


def _table(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadConfig(f"{what} must be a table of keys and values, got {type(value).__name__}")
    return value


def _sentence(error: ValidationError, values: Mapping[str, Any]) -> str:
    """One sentence for each mistake, with a did-you-mean for keys."""
    sentences = []
    for item in error.errors(include_url=False):
        where = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            parent, _, key = where.rpartition(".")
            sentences.append(str(UnknownName(f"key in {parent or 'the config'}:", key, _fields(parent, values))))
        elif item["type"] == "value_error":
            sentences.append(str(item["ctx"]["error"]))
        else:
            shown = "" if item["type"] == "missing" else f" = {item['input']!r:.80}"
            sentences.append(f"{where}{shown}: {item['msg'][0].lower()}{item['msg'][1:]}")
    return "; ".join(sentences)


def _fields(section: str, values: Mapping[str, Any]) -> list[str]:
    if section in METHOD_KINDS:
        table = values.get(section)
        name = table.get("method") if isinstance(table, Mapping) else table
        return list(registry(section)[str(name)].model_fields)  # type: ignore[attr-defined]
    sections: dict[str, type[Settings]] = {"attention": Attention, "compile": Compile, "text": Text}
    return list(sections.get(section, Config).model_fields)
