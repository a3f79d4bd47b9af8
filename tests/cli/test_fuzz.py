"""Made-up configs, metadata and prompt files: what cannot be read is refused in a sentence, never with a traceback."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from fastdiff.config import Config, layers_of, parse_set, read_file, resolve
from fastdiff.errors import FastdiffError
from fastdiff.images import Replay, encode, read
from fastdiff.registry import names, registry
from fastdiff.studio import wanted
from tests.cli.test_images import PICTURE, made, with_chunk

FUZZ = settings(
    max_examples=150, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
TEXT = st.text(st.characters(codec=None), max_size=30)  # lone surrogates, too
LEAF = (
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT
    | st.sampled_from(["deepcache", "fast", "balanced", "w8a8", "cfg", 10**400, -1, "../x.toml", "/dev/zero", [[[]]]])
)  # fmt: skip
KEYS = st.sampled_from(["cache", "parallel", "quant", "attention", "compile", "preset", "family", "method"]) | TEXT
JSON = st.recursive(LEAF, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4))


@st.composite
def method_tables(draw: Any) -> dict[str, Any]:
    """A config whose one method exists, with its own fields and values of any kind."""
    kind = draw(st.sampled_from(["cache", "parallel", "quant"]))
    name = draw(st.sampled_from(names()[kind]))
    fields = st.sampled_from(sorted(registry(kind)[name].model_fields))
    return {kind: draw(st.dictionaries(fields, JSON, max_size=4)) | {"method": name}}


def refused_or(make: Any) -> Any:
    """What `make` gives, or None where it refuses in one line."""
    try:
        return make()
    except FastdiffError as error:
        assert str(error).strip()
        return None


@FUZZ
@given(st.dictionaries(KEYS, JSON, max_size=4) | method_tables())
def test_config(table: dict[str, Any]) -> None:
    found = refused_or(lambda: resolve(layers_of(table)).config)
    if found is not None:
        assert Config.from_json(found.model_dump_json()) == found


@FUZZ
@given(TEXT | JSON.map(lambda value: json.dumps(value)))
def test_config_as_text(tmp_path: Path, text: str) -> None:
    assert isinstance(refused_or(lambda: Config.from_json(text)), Config | None)
    assert isinstance(refused_or(lambda: parse_set(text)), dict | None)
    found = refused_or(lambda: resolve([("set", parse_set(f"cache.{text}"))]).config)
    assert isinstance(found, Config | None)
    for name in ("x.toml", "x.json"):
        (tmp_path / name).write_bytes(text.encode("utf-8", "surrogatepass"))
        assert isinstance(refused_or(lambda name=name: read_file(tmp_path / name)), dict | None)


@FUZZ
@given(
    JSON | st.dictionaries(st.sampled_from(sorted(Replay.model_fields)), JSON).map(lambda d: made().model_dump() | d)
)
def test_metadata(tmp_path: Path, value: Any) -> None:
    for text in (json.dumps(value), json.dumps(made().model_dump() | value) if isinstance(value, dict) else ""):
        found = refused_or(lambda text=text: read(with_chunk(tmp_path / "x.png", text)))
        assert isinstance(found, Replay | None)


@FUZZ
@given(st.text(min_size=1, max_size=300), st.text(max_size=50))
def test_metadata_round_trip(tmp_path: Path, prompt: str, negative: str) -> None:
    """No prompt can put words into another field."""
    if not prompt.strip():
        return
    before = made(prompt=prompt, negative_prompt=negative)
    (tmp_path / "x.png").write_bytes(encode(PICTURE, before))
    assert read(tmp_path / "x.png") == before


@FUZZ
@given(st.integers(0, 10_000), st.binary(max_size=8), st.booleans())
def test_damaged_png(tmp_path: Path, place: int, junk: bytes, cut: bool) -> None:
    data = encode(PICTURE, made())
    place %= len(data)
    (tmp_path / "x.png").write_bytes(data[:place] + junk + (b"" if cut else data[place + len(junk) :]))
    assert isinstance(refused_or(lambda: read(tmp_path / "x.png")), Replay | None)


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt", b"iCCP"])
def test_a_compressed_bomb_in_any_chunk(tmp_path: Path, kind: bytes) -> None:
    """100 MB of nothing in 100 kB."""
    packed = zlib.compress(b" " * (100 << 20))
    head = {b"zTXt": b"fastdiff\0\0", b"iTXt": b"fastdiff\0\1\0\0\0", b"iCCP": b"profile\0\0"}[kind]
    body = head + packed
    data = encode(PICTURE)
    chunk = len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")
    (tmp_path / "x.png").write_bytes(data[:33] + chunk + data[33:])
    with pytest.raises(FastdiffError):
        read(tmp_path / "x.png")


@FUZZ
@given(st.lists(TEXT | JSON.map(json.dumps) | JSON.map(lambda value: json.dumps({"prompt": value})), max_size=6))
def test_prompt_file(tmp_path: Path, lines: list[str]) -> None:
    """Each line that says something is drawn or refused, by itself."""
    lines = [line.replace("\n", " ").replace("\r", " ") for line in lines]
    (tmp_path / "p.jsonl").write_bytes("\n".join(["{}", *lines]).encode("utf-8", "replace"))
    found = wanted.listed([], tmp_path / "p.jsonl", {}, [], 1, lasting=True)
    said = [number for number, line in enumerate(["{}", *lines], 1) if line.encode("utf-8", "replace").decode().strip()]
    assert [one.where for one in found] == [f"{tmp_path / 'p.jsonl'} line {number}: " for number in said]
    assert all((one.sampling is None) == (one.mistake is not None) for one in found)
