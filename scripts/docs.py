"""The parts of the site that are made from the code and the committed benchmarks: a hook of mkdocs (see mkdocs.yml).

Pages of methods come from the registry: docstrings, settings from the schema, rows of benchmarks/*.json. Pages in docs/
take made parts where they have a line `<!-- made: ... -->`. Nothing of it is written into the repository.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import readme  # beside this file; mkdocs puts the folder of a hook on the path
import solver_tables
import step_figures
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from fastdiff.caching.predictors import PREDICTORS
from fastdiff.config import Config, presets, read_file
from fastdiff.method import Method
from fastdiff.registry import ROOMS, registry

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"
TITLES = {"cache": "Caching", "parallel": "Parallel", "quant": "Quantization", "solver": "Solver"}
OUTSIDE = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}  # in the root; on the site
PARTED = {
    "model": "model", "name": "run", "ranks": "ranks", "steps": "steps", "psnr": "PSNR dB", "ssim": "SSIM",
    "prompt_accuracy": "prompt accuracy", "ratio": "weights, times smaller", "denoiser_mb": "weights MB",
    "bytes_per_step_and_image": "bytes sent a step and image",
}  # fmt: skip
_SETTING_HEAD = ("setting", "type", "default", "what it says")


def on_config(config: Any) -> Any:
    """Puts a page for each method into the navigation."""
    for entry in config.nav:
        if "Methods" in entry:
            pages = [
                {TITLES[kind]: [{name: address(kind, name)} for name in sorted(own(kind))]}
                for kind in ROOMS
                if own(kind)
            ]
            entry["Methods"] = [{"All methods": "methods/index.md"}, *pages]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Adds the made pages, the pictures of the benchmarks, and the pages that live in the root."""
    made = {"methods/index.md": methods_index(), **dict(method_pages())}
    for method in own("cache"):
        for name, model, rows in step_figures.figures(method):
            made[f"images/{name}.svg"] = step_figures.strips(model, rows)
    made |= {there: (ROOT / here).read_text(encoding="utf-8") for here, there in OUTSIDE.items()}
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    for picture in sorted([*BENCHMARKS.glob("*.png"), *BENCHMARKS.glob("*.json")]):
        files.append(File.generated(config, f"benchmarks/{picture.name}", abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Page, config: Any, files: Files) -> str:
    """Made parts, links to what lies outside docs/, and links from the names of methods in tables to their pages."""
    here = page.file.src_uri
    markdown = re.sub(r"<!-- made: ([\w-]+) -->", lambda found: part(found[1], here), markdown)
    if here in OUTSIDE.values():
        markdown = markdown.replace("](docs/", "](")
    for name, there in OUTSIDE.items():
        markdown = markdown.replace(f"](../{name}", f"]({there}")
    markdown = markdown.replace("](../benchmarks/", "](benchmarks/").replace("](../README.md", "](index.md")
    return markdown if here.startswith("methods/") else linked(markdown)


def linked(markdown: str) -> str:
    """Names of methods in the first cell of a table row, as links."""
    known = {name: address(kind, name) for kind in ROOMS for name in own(kind)}

    def link(found: re.Match[str]) -> str:
        return re.sub(r"`(\w+)`", lambda n: f"[{n[0]}]({known[n[1]]})" if n[1] in known else n[0], found[0])

    return re.sub(r"^\| (?:`\w+`(?:, )?)+ \|", link, markdown, flags=re.MULTILINE)


def part(name: str, here: str) -> str:
    """What a page asks for. Raises PluginError for a name that does not exist."""
    parts: dict[str, Callable[[], str]] = {
        "config-sections": config_sections, "common-settings": shared_settings, "presets": presets_table,
        "rivals": rivals, "methods": lambda: methods_index(""), "solvers": readme.solvers, "sharding": sharding,
        **solver_tables.parts(),
    }  # fmt: skip
    if name not in parts:
        raise PluginError(f"{here} asks for the part {name!r}; there are {', '.join(parts)}")
    return parts[name]()


def own(kind: str) -> dict[str, type[Method]]:
    """The methods of a room that ship with fastdiff."""
    return {name: cls for name, cls in registry(kind).items() if cls.__module__.startswith("fastdiff.")}


def address(kind: str, name: str) -> str:
    return f"methods/{kind}/{name}.md"


# pages of methods


def methods_index(above: str = "methods/") -> str:
    """All methods, by room."""
    parts = ["# Methods"] if above else []
    for kind in ROOMS:
        rows = [
            (f"[`{name}`]({address(kind, name).removeprefix(above)})", readme.summary(cls), readme.source(cls))
            for name, cls in sorted(own(kind).items())
        ]
        parts += [f"## {TITLES[kind]}", readme.table(("method", "what it does", "source"), rows)] if rows else []
    return "\n\n".join(parts) + "\n"


def method_pages() -> Iterator[tuple[str, str]]:
    for kind in ROOMS:
        for name, cls in own(kind).items():
            yield address(kind, name), method_page(kind, name, cls)


def method_page(kind: str, name: str, cls: type[Method]) -> str:
    """Paper, idea and formula from the docstrings, settings from the schema, numbers from the benchmarks."""
    module = inspect.cleandoc(importlib.import_module(cls.__module__).__doc__ or "")
    shared = shared_of(kind)
    fields = [field for field in cls.model_fields if field != "method" and not same(shared, field, cls)]
    settings = settings_table(cls, fields) if fields else "None of its own."
    if shared:
        link = "the [settings of every method](../../config.md#settings-of-every-method) of this room"
        settings += f"\n\nBesides these it takes {link}."
    source = cls.__module__.removeprefix("fastdiff.").replace(".", "/") + ".py"
    return "\n\n".join([
        f"# {name}", autolinked(module), paragraphs(cls), *decisions(cls),
        f'```toml\n[{kind}]\nmethod = "{name}"\n{"".join(examples(cls, fields))}```',
        *[f"![Which steps {name} computes on {model}](../../images/{figure}.svg)"
          for figure, model, _ in step_figures.figures(name)],
        "## Settings", settings, "## Measured", measured(kind, name), f"Its code is `{source}`.", "",
    ])  # fmt: skip


def paragraphs(cls: type) -> str:
    """The class docstring as Markdown; a paragraph that starts with `Formula:` stands apart."""
    text = inspect.cleandoc(cls.__doc__ or "")
    return re.sub(r"^Formula: ((?:.+\n?)+)", framed, text, flags=re.MULTILINE)


def framed(found: re.Match[str]) -> str:
    return '!!! abstract "Formula"\n' + textwrap.indent(found[1].strip(), "    ") + "\n"


def decisions(cls: type) -> list[str]:
    """What the method's own functions say of how it decides and predicts."""
    told = []
    for name in ("mask", "change", "around", "weigher", "corrector"):
        function = vars(cls).get(name)
        if function is not None and function.__doc__:
            told.append(f"`{name}`: {inspect.cleandoc(function.__doc__)}")
    if "predictor" in cls.model_fields and cls.__module__.startswith("fastdiff.caching"):  # type: ignore[attr-defined]
        default = str(cls.model_fields["predictor"].default)  # type: ignore[attr-defined]
        told.append(f"Skipped values: `{default}` unless told otherwise. {inspect.getdoc(PREDICTORS[default])}")
    return told


def examples(cls: type[Method], fields: Iterable[str]) -> Iterator[str]:
    """Up to three settings with their defaults, as TOML."""
    simple = [(f, cls.model_fields[f].default) for f in fields]
    for field, value in [(f, v) for f, v in simple if isinstance(v, (bool, int, float, str))][:3]:
        yield f"{field} = {json.dumps(value)}\n"


def shared_of(kind: str) -> list[tuple[str, Any]]:
    """Settings that all methods of a room have from one base class, with their descriptions there."""
    classes = list(own(kind).values())
    if not classes:
        return []
    shared = set.intersection(*(set(cls.model_fields) for cls in classes)) - {"method"}
    base = next(b for b in classes[0].__mro__ if issubclass(b, Method) and all(issubclass(c, b) for c in classes))
    return [(field, base) for field in base.model_fields if field in shared]


def same(shared: list[tuple[str, Any]], field: str, cls: type[Method]) -> bool:
    """Whether a field is as the base class has it."""
    base = dict(shared).get(field)
    return base is not None and cls.model_fields[field].default == base.model_fields[field].default


def settings_table(cls: type, fields: Iterable[str]) -> str:
    properties = cls.model_json_schema()["properties"]  # type: ignore[attr-defined]
    rows = [(f"`{f}`", type_of(properties[f]), default_of(cls, f), described(cls, f)) for f in fields]
    return readme.table(_SETTING_HEAD, rows)


def described(cls: type, field: str) -> str:
    """The description of a field; a subclass that gives only a default keeps that of its base."""
    for base in cls.__mro__:
        found = getattr(base, "model_fields", {}).get(field)
        if found is not None and found.description:
            return found.description.replace("|", "\\|")
    return ""


def default_of(cls: type, field: str) -> str:
    found = cls.model_fields[field]  # type: ignore[attr-defined]
    if found.is_required():
        return "must be given"
    value = found.get_default(call_default_factory=True)
    return "-" if value is None else f"`{json.dumps(value, default=str)}`"


def type_of(schema: Mapping[str, Any]) -> str:
    """A JSON schema in a few words, with its bounds."""
    if "anyOf" in schema:
        return " or ".join(type_of(one) for one in schema["anyOf"] if one.get("type") != "null")
    if "$ref" in schema:
        return "the path of a plan, or a table" if "plan" in str(schema).lower() else "table"
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{v}`" for v in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array":
        return f"list of {type_of(schema.get('items', {}))}" if schema.get("items") else "list"
    name = {"integer": "whole number", "string": "text", "boolean": "true, false", "object": "table"}
    low, high = schema.get("minimum", schema.get("exclusiveMinimum")), schema.get("maximum")
    high = schema.get("exclusiveMaximum") if high is None else high
    bounds = f" {low} to {high}" if None not in (low, high) else f" from {low}" if low is not None else ""
    bounds = f" up to {high}" if low is None and high is not None else bounds
    return name.get(str(schema.get("type")), str(schema.get("type", "any"))) + bounds


def autolinked(text: str) -> str:
    return readme._URL.sub(lambda found: f"<{found[0].rstrip('.')}>" + "." * found[0].endswith("."), text)


# numbers


def rows_with(kind: str, name: str) -> list[Mapping[str, Any]]:
    """Rows of all committed benchmarks that used a method, whatever else the files hold."""
    found = []
    for path in sorted(BENCHMARKS.glob("*.json")):
        rows = json.loads(path.read_text(encoding="utf-8"))
        for row in rows if isinstance(rows, list) else []:
            lever = (row.get("config") or {}).get(kind) if set(readme.COLUMNS) <= set(row) else None
            if lever is not None and lever.get("method") == name:
                found.append({**row, "file": path.name})
    return found


def measured(kind: str, name: str) -> str:
    rows, others = rows_with(kind, name), parted(kind, name)
    if not rows:
        return others or "This method has no row in the committed benchmarks."
    columns = {key: title for key, title in readme.COLUMNS.items() if key != "kind"}
    body = [
        (f"[{row['model']}](../../benchmarks/{row['file']})", *(readme.cell(key, row[key]) for key in columns))
        for row in rows
    ]
    said = "Compared with the plain picture of the same seed; [how to read it](../../results.md)."
    return "\n\n".join([readme.table(("model", *columns.values()), body), said, *([others] if others else [])])


def parted(kind: str, name: str) -> str:
    """Rows of the measurements that are no bench of fastdiff: on several ranks, of integers, of one method alone."""
    found = []
    for path in sorted(BENCHMARKS.glob(f"{kind}-*.json")):
        told = json.loads(path.read_text(encoding="utf-8"))
        for row in told if isinstance(told, list) else told.get("rows", []):
            if "psnr" in row and ((row.get(kind) or {}).get("method") == name or path.stem == f"{kind}-{name}"):
                found.append({**row, "model": f"[{row['model']}](../../benchmarks/{path.name})"})
    columns = {key: title for key, title in PARTED.items() if any(key in row for row in found)}
    if found:
        body = [tuple(readme.cell(key, row.get(key, "")) for key in columns) for row in found]
        return readme.table(tuple(columns.values()), body) + "\n\nCompared with one device in float32, the same seeds."
    alone = BENCHMARKS / f"{name}.json"
    return f"Measured in [benchmarks/{alone.name}](../../benchmarks/{alone.name})." if alone.is_file() else ""


def sharding() -> str:
    """What ranks hold of a model that is shared out, the most of all ranks, and what streaming costs one process."""
    told = json.loads((BENCHMARKS / "parallel-sharding.json").read_text(encoding="utf-8"))
    keys = ("resident_most_while_loading", "resident_between_steps", "resident_most_of_a_run")
    rows = []
    for ranks, measured in told["ranks"].items():
        for name in dict.fromkeys(row["name"] for row in measured):
            most = [max(row[key] for row in measured if row["name"] == name) for key in keys]
            rows.append((ranks, name, *(f"{size / told['weights']:.2f}" for size in most)))
    head = ("ranks", "run", "most while loading", "between steps", "most of a run")
    alone = [(row["name"], f"{row['seconds_a_step']:.2f}") for row in told["one_process"]]
    weights, block = (f"{told[key] / 1e6:,.0f} MB" for key in ("weights", "largest_block"))
    return (
        f"Resident memory of the rank with the most, in parts of all weights, {weights}; largest block {block}.\n\n"
        f"{readme.table(head, rows)}\n\n{readme.table(('one process', 's a step'), alone)}"
    )


def rivals() -> str:
    """For each rival, the row of ours that beats it or comes nearest."""
    parts = []
    for path in sorted(BENCHMARKS.glob("*-verdict.json")):
        model, found = path.stem.removesuffix("-verdict"), json.loads(path.read_text(encoding="utf-8"))
        rows = [
            (row["rival"], f"{row['speedup']:.2f}", f"{row['psnr']:.1f}", row["beaten_by"] or "**not beaten**",
             told(row))
            for row in sorted(found, key=lambda row: row["speedup"])
        ]  # fmt: skip
        beaten = sum(bool(row["beaten_by"]) for row in found)
        head = ("rival", "speedup of denoising", "PSNR dB", "beaten by", "how")
        parts.append(f"### {model}\n\n{beaten} of {len(found)} are beaten.\n\n{readme.table(head, rows)}")
    return "\n\n".join(parts)


def told(row: Mapping[str, Any]) -> str:
    """How far the row of ours that is named lies from the rival, by the rule that is nearer to holding."""
    if row.get("margin") is None:
        return "-"
    unit = f"{row['margin']:.2f} times as fast" if row["rule"] == "faster" else f"{row['margin']:+.1f} dB"
    same = "at its PSNR or better" if row["rule"] == "faster" else "at its speedup or better"
    return f"{unit} {same}" if row["beaten_by"] else f"nearest is {row['nearest']}: {unit} {same}"


# config


def config_sections() -> str:
    """Every section of the config that is no method."""
    parts = []
    for name, field in Config.model_fields.items():
        if name in ROOMS:
            listed = ", ".join(f"[`{method}`]({address(name, method)})" for method in sorted(own(name)))
            parts.append(f"## [{name}]\n\n`method` is one of {listed or 'none yet'}; its settings follow.")
            continue
        cls = field.annotation
        assert inspect.isclass(cls)
        parts.append(f"## [{name}]\n\n{inspect.cleandoc(cls.__doc__ or '')}\n\n{settings_table(cls, cls.model_fields)}")
    return "\n\n".join(parts)


def shared_settings() -> str:
    parts = []
    for kind in ROOMS:
        shared = shared_of(kind)
        if shared:
            parts.append(f"### {TITLES[kind]}\n\n{settings_table(shared[0][1], [field for field, _ in shared])}")
    return "\n\n".join(parts)


def presets_table() -> str:
    rows = []
    for name, path in presets().items():
        values = read_file(path)
        said = values.pop("description", "")
        rows.append((f"`{name}`", said, f"`{json.dumps(values)}`" if values else "-"))
    return readme.table(("preset", "what it does", "settings"), rows)
