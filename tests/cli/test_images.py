"""PNG metadata: what goes in comes out, nothing half-written, nothing hostile believed."""

from __future__ import annotations

import errno
import json
import os
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image, PngImagePlugin

from fastdiff.config import Config
from fastdiff.errors import FastdiffError
from fastdiff.images import CHUNK, Replay, read, save

PICTURE = Image.new("RGB", (8, 8), (200, 10, 10))


def made(**changes: object) -> Replay:
    values = {
        "prompt": "a red circle",
        "seed": 1,
        "steps": 50,
        "guidance_scale": 3.0,
        "width": 64,
        "height": 64,
        "model": "shapes-unet",
        "scheduler": "DDIMScheduler",
        "dtype": "float32",
        "config": Config(cache={"method": "deepcache", "interval": 4}).model_dump(mode="json"),
        "report": {"steps": 50, "cached": 37},
        "versions": {"fastdiff": "0"},
    }
    return Replay.model_validate(values | changes)


def with_chunk(path: Path, text: str, compressed: bool = False) -> Path:
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text(CHUNK, text, zip=compressed)
    PICTURE.save(path, pnginfo=chunks)
    return path


def test_what_is_saved_is_read(tmp_path: Path) -> None:
    before = made(prompt='ein "großer" Kreis\n赤い円 🔴', negative_prompt="verschwommen")
    assert read(save(PICTURE, tmp_path / "out.png", before)) == before


def test_config_survives_the_png(tmp_path: Path) -> None:
    config = Config(cache={"method": "ab_cache", "interval": 3}, compile={"enabled": True})
    path = save(PICTURE, tmp_path / "out.png", made(config=config.model_dump(mode="json")))
    assert Config(**read(path).config) == config


def test_parameters_are_what_other_tools_read(tmp_path: Path) -> None:
    path = save(PICTURE, tmp_path / "out.png", made(negative_prompt="blurry", model="./my-model"))
    with Image.open(path) as image:
        assert image.info["parameters"] == (
            "a red circle\nNegative prompt: blurry\n"
            "Steps: 50, Sampler: DDIM, CFG scale: 3.0, Seed: 1, Size: 64x64, Model: my-model"
        )


def test_metadata_is_left_out(tmp_path: Path) -> None:
    path = save(PICTURE, tmp_path / "out.png")
    with Image.open(path) as image:
        assert not image.info


def test_taken_names_get_a_number(tmp_path: Path) -> None:
    paths = [save(PICTURE, tmp_path / "out.png") for _ in range(3)]
    assert [path.name for path in paths] == ["out.png", "out-1.png", "out-2.png"]


def test_overwrite_replaces(tmp_path: Path) -> None:
    for seed in (1, 2):
        path = save(PICTURE, tmp_path / "out.png", made(seed=seed), overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["out.png"]
    assert read(path).seed == 2


@pytest.mark.parametrize("hard_links", [True, False])
def test_writers_at_once_never_share_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hard_links: bool) -> None:
    if not hard_links:
        monkeypatch.setattr(os, "link", _refuse(OSError(errno.EPERM, "no links here")))
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda seed: save(PICTURE, tmp_path / "out.png", made(seed=seed)), range(24)))
    assert sorted(tmp_path.iterdir()) == sorted(set(paths))
    assert [read(path).seed for path in paths] == list(range(24))


def _refuse(error: BaseException):
    def refuse(*_: object, **__: object) -> None:
        raise error

    return refuse


def test_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", _refuse(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(FastdiffError, match=r"out\.png' cannot be written: No space left on device"):
        save(PICTURE, tmp_path / "out.png", made())
    assert not list(tmp_path.iterdir())


def test_interrupt_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(PICTURE, tmp_path / "out.png", made(seed=7))
    monkeypatch.setattr(os, "fsync", _refuse(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        save(PICTURE, path, made(seed=8), overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["out.png"]
    assert read(path).seed == 7


def test_interrupted_reservation_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", _refuse(OSError(errno.EPERM, "no links here")))
    monkeypatch.setattr(Path, "replace", _refuse(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        save(PICTURE, tmp_path / "out.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["missing/out.png", "a-file/out.png", "x" * 300 + ".png"])
def test_unwritable_names(tmp_path: Path, name: str) -> None:
    (tmp_path / "a-file").touch()
    with pytest.raises(FastdiffError, match="cannot be written"):
        save(PICTURE, tmp_path / name)


BAD_CHUNKS = {
    "not json": ("{", "are not JSON"),
    "nested": ("[" * 100_000, "are not JSON"),
    "no object": ("[]", "do not hold"),
    "no steps": (json.dumps(made().model_dump(exclude={"steps"})), "steps: field required"),
    "zero steps": (json.dumps(made().model_dump() | {"steps": 0}), "steps = 0: "),
    "absurd size": (json.dumps(made().model_dump() | {"width": 10**9}), "width = 1000000000: "),
    "nan": (json.dumps(made().model_dump() | {"guidance_scale": float("nan")}), "guidance_scale = nan: "),
    "unknown key": (json.dumps(made().model_dump() | {"code": "x"}), "code = x: "),
    "no prompt": (json.dumps(made().model_dump() | {"prompt": " "}), "the prompt is empty"),
    "huge": (json.dumps({"prompt": "x" * (1 << 20)}), "over 1 MiB"),
}


@pytest.mark.parametrize("case", BAD_CHUNKS)
def test_bad_settings_are_refused(tmp_path: Path, case: str) -> None:
    text, message = BAD_CHUNKS[case]
    with pytest.raises(FastdiffError) as error:
        read(with_chunk(tmp_path / "x.png", text))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_compressed_bomb_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FastdiffError):
        read(with_chunk(tmp_path / "x.png", " " * (50 << 20), compressed=True))


def _block(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_picture_bomb_is_refused(tmp_path: Path) -> None:
    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    path = tmp_path / "bomb.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + _block(b"IHDR", header) + _block(b"IDAT", b"") + _block(b"IEND", b""))
    with pytest.raises(FastdiffError, match="cannot be read"):
        read(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    jpeg, plain, cut = tmp_path / "x.jpg", tmp_path / "plain.png", tmp_path / "cut.png"
    PICTURE.save(jpeg)
    PICTURE.save(plain)
    cut.write_bytes(save(PICTURE, tmp_path / "whole.png", made()).read_bytes()[:200])
    for path, message in (
        (jpeg, "is not a PNG file"),
        (plain, "carries no fastdiff settings"),
        (cut, "cut.png"),
        (tmp_path, "cannot be read"),
        (tmp_path / "none.png", "does not exist"),
    ):
        with pytest.raises(FastdiffError, match=message):
            read(path)
