"""What pipelines make, as files that say how they were made: pictures, videos, sounds."""

from __future__ import annotations

import io
import struct
import tempfile
import wave
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .errors import BackendUnavailable, BadConfig, FastdiffError
from .images import MAX_CHUNK, Replay, chunk, parameters, parse, put
from .images import encode as png

SUFFIXES = {
    "picture": (".png", ".webp", ".jpg", ".jpeg"),
    "video": (".mp4", ".gif", ".webp"),
    "sound": (".wav",),
}
ALL = tuple(dict.fromkeys(suffix for suffixes in SUFFIXES.values() for suffix in suffixes))
QUALITY = 95  # of JPEG and lossy WebP
_EXIF_MOST = 60_000  # bytes; a JPEG has no place for more
_EXIF, _DESCRIPTION, _COMMENT = 0x8769, 0x010E, 0x9286  # EXIF: our JSON, and what the A1111 family of tools reads
_BOX = b"fastdiff.replay\0"  # the name of our box in an MP4, which players leave out


@dataclass(frozen=True)
class Clip:
    frames: list[Image.Image]
    fps: float

    @property
    def size(self) -> tuple[int, int]:
        return self.frames[0].size


@dataclass(frozen=True)
class Sound:
    samples: NDArray  # channels x time, -1 to 1
    rate: int
    size = (None, None)


Made = Image.Image | Clip | Sound


def taken(output: Any, pipe: Any, fps: float) -> Made:
    """The first of what a pipeline returned. Raises FastdiffError where that is nothing that can be shown or heard."""
    for name in ("frames", "videos", "audios", "audio", "images"):
        found = getattr(output, name, None)
        if found is None or not len(found):
            continue
        if name.startswith("audio"):
            return Sound(_channels(found), _rate(pipe))
        if name == "images" and isinstance(found[0], Image.Image):
            return found[0]
        frames = [_picture(frame) for frame in (found[0] if name != "images" or isinstance(found[0], list) else found)]
        return Clip(frames, fps) if name != "images" else frames[0]
    raise FastdiffError(f"{type(pipe).__name__} returned no picture, video or sound")


def _picture(frame: Any) -> Image.Image:
    if isinstance(frame, Image.Image):
        return frame
    values = _array(frame)
    if values.shape[0] in (1, 3) and values.shape[-1] not in (1, 3):
        values = values.transpose(1, 2, 0)
    return Image.fromarray((values.clip(0, 1) * 255).round().astype(np.uint8).squeeze())


def _array(value: Any) -> NDArray:
    return np.asarray(value.detach().float().cpu() if hasattr(value, "detach") else value)


def _channels(found: Any) -> NDArray:
    first = _array(found[0])
    first = _array(found) if first.ndim == 0 else first
    return first[None] if first.ndim == 1 else first if first.shape[0] <= first.shape[-1] else first.T


def _rate(pipe: Any) -> int:
    """Samples a second: of the pipeline, or of the model that makes them."""
    parts = [pipe, *(getattr(pipe, name, None) for name in ("vocoder", "vae", "codec"))]
    places = [place for part in parts for place in (part, getattr(part, "config", None))]
    rates = [getattr(place, name, None) for place in places for name in ("sampling_rate", "sample_rate")]
    found = next((rate for rate in rates if isinstance(rate, int)), None)
    if found is None:
        raise FastdiffError(f"{type(pipe).__name__} does not say how many samples a second its sound has")
    return found


def check(suffix: str, kind: str, maker: str, still: bool = False) -> None:
    """Raises BadConfig for a format that this kind cannot be written in, BackendUnavailable for one that needs more."""
    known = SUFFIXES[kind] + (SUFFIXES["picture"] if still else ())
    if suffix.lower() not in known:
        raise BadConfig(f"{maker} makes a {kind}; end the name of -o in {' or '.join(dict.fromkeys(known))}")
    if suffix.lower() == ".mp4" and not can_mp4():
        raise BackendUnavailable("MP4 needs imageio-ffmpeg: pip install 'fastdiff[video]'; or end -o in .gif or .webp")


def can_mp4() -> bool:
    return find_spec("imageio") is not None and find_spec("imageio_ffmpeg") is not None


def usual(kind: str) -> str:
    """The suffix of a kind where nobody says one."""
    return SUFFIXES[kind][0] if kind != "video" or can_mp4() else ".webp"


def suffix(made: Made) -> str:
    """The usual suffix for what was made."""
    return usual("sound" if isinstance(made, Sound) else "video" if isinstance(made, Clip) else "picture")


def save(made: Made, path: Path, how: Replay | None = None, *, overwrite: bool = False) -> Path:
    """Write it in the format of the name, whole or not at all, and return its path.

    A name that is taken gets a number, unless `overwrite`. Raises FastdiffError if it cannot be written.
    """
    data = encode(made, path.suffix.lower(), how)
    saved = put(lambda file: file.write(data), path, overwrite=overwrite)
    if how is not None and _text_of(data, path.suffix.lower()) is None:  # the format has no place for so much
        put(lambda file: file.write(_json(how)), _beside(saved), overwrite=True)
    return saved


def encode(made: Made, suffix: str, how: Replay | None = None, quality: int | None = None) -> bytes:
    """The bytes of a file: of a PNG, WebP, JPEG, MP4, GIF or WAV."""
    if isinstance(made, Sound):
        return _riff(_wav(made) + (_list(how) if how else b""))
    if isinstance(made, Clip) and len(made.frames) == 1 and suffix != ".mp4":
        made = made.frames[0]
    if suffix == ".mp4":
        assert isinstance(made, Clip)
        return _mp4(made) + (_box(how) if how else b"")
    if suffix == ".png":
        return png(made, how)  # type: ignore[arg-type]
    first, options = (made.frames[0], _moving(made)) if isinstance(made, Clip) else (made, {})
    if suffix == ".gif":
        options |= {"comment": _json(how)} if how else {}
    else:
        first = first if suffix == ".webp" else first.convert("RGB")
        options |= {"quality": quality or QUALITY} | ({"exif": _exif(how)} if how else {})
        options |= {"subsampling": 0} if suffix != ".webp" and quality is None else {}
    file = io.BytesIO()
    first.copy().save(file, {".jpg": "JPEG", ".jpeg": "JPEG"}.get(suffix, suffix[1:].upper()), **options)
    return file.getvalue()


def _moving(clip: Clip) -> dict[str, Any]:
    rest = [frame.copy() for frame in clip.frames[1:]]
    return {"save_all": True, "append_images": rest, "duration": round(1000 / clip.fps), "loop": 0}


def _mp4(clip: Clip) -> bytes:
    from diffusers.utils import export_to_video

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        frames = [frame.convert("RGB") for frame in clip.frames]
        export_to_video(frames, str(path), fps=clip.fps, quality=8, macro_block_size=2)  # type: ignore[arg-type]
        return path.read_bytes()


def _wav(sound: Sound) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setparams((len(sound.samples), 2, sound.rate, 0, "NONE", "NONE"))
        out.writeframes((sound.samples.T.clip(-1, 1) * 32767).round().astype("<i2").tobytes())
    return file.getvalue()


def _json(how: Replay) -> bytes:
    return how.model_dump_json(ensure_ascii=True).encode()


def _exif(how: Replay) -> Image.Exif:
    exif, text = Image.Exif(), _json(how)
    if len(text) < _EXIF_MOST:
        exif[_DESCRIPTION] = text.decode()
        exif.get_ifd(_EXIF)[_COMMENT] = b"UNICODE\0" + parameters(how).encode("utf-16-be")
    return exif


def _box(how: Replay) -> bytes:
    text = _json(how)
    return struct.pack(">I4s", 8 + len(_BOX) + len(text), b"uuid") + _BOX + text


def _list(how: Replay) -> bytes:
    """A comment as RIFF files have them."""
    text = _json(how) + b"\0"
    text += b"\0" * (len(text) % 2)
    return struct.pack("<4sI4s4sI", b"LIST", 12 + len(text), b"INFO", b"ICMT", len(text)) + text


def _riff(data: bytes) -> bytes:
    return data[:4] + struct.pack("<I", len(data) - 8) + data[8:]


def read(path: Path) -> Replay:
    """What a file of ours was made with; nothing is decoded. Raises FastdiffError for any other file."""
    if _beside(path).is_file():
        return parse(_beside(path).read_text(encoding="utf-8"), path)
    suffix = path.suffix.lower()
    if suffix not in ALL or suffix == ".png" or not path.is_file():
        return parse(chunk(path), path)
    text = _text_of(path.read_bytes(), suffix)
    if text is None:
        raise FastdiffError(f"{str(path)!r} carries no fastdiff settings; it was not made by fastdiff, or was stripped")
    return parse(text, path)


def _text_of(data: bytes, suffix: str) -> str | None:
    try:
        if suffix in (".mp4", ".wav"):
            found = next(_boxes(data) if suffix == ".mp4" else _comments(data), None)
            return None if found is None or len(found) > MAX_CHUNK else found.decode("ascii")
        with Image.open(io.BytesIO(data), formats=["PNG", "WEBP", "JPEG", "GIF"]) as image:
            if suffix == ".png":
                return ""
            told = image.info.get("comment", b"") if suffix == ".gif" else image.getexif().get(_DESCRIPTION, "")
        text = told.decode("ascii") if isinstance(told, bytes) else told
        return text if text.startswith("{") and len(text) <= MAX_CHUNK else None
    except (OSError, ValueError, SyntaxError, struct.error, Image.DecompressionBombError):
        return None


def _boxes(data: bytes) -> Iterator[bytes]:
    at = 0
    while at + 8 <= len(data):
        size, name = struct.unpack_from(">I4s", data, at)
        if name == b"uuid" and data[at + 8 : at + 8 + len(_BOX)] == _BOX:
            yield data[at + 8 + len(_BOX) : at + size]
        if size == 1:
            size = struct.unpack_from(">Q", data, at + 8)[0]
        at += max(size, 8)


def _comments(data: bytes) -> Iterator[bytes]:
    at = 12
    while at + 8 <= len(data):
        name, size = struct.unpack_from("<4sI", data, at)
        if name == b"LIST" and data[at + 8 : at + 16] == b"INFOICMT":
            yield data[at + 20 : at + 8 + size].rstrip(b"\0")
        at += 8 + size + size % 2


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")
