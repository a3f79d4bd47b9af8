"""PNG files that say how they were made, so that they can be made again."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Annotated, Any

from PIL import Image, PngImagePlugin
from pydantic import Field, ValidationError, field_validator

from .errors import FastdiffError
from .method import Settings
from .reading import reading

CHUNK = "fastdiff"
MAX_CHUNK = 1 << 20  # characters; a real one has a few thousand

Prompt = Annotated[str, Field(max_length=20_000)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Steps = Annotated[int, Field(ge=1, le=10_000)]
Guidance = Annotated[float, Field(ge=0, le=1000)]
Size = Annotated[int, Field(ge=1, le=16_384)]
FilePath = Annotated[str, Field(min_length=1, max_length=4_000)]


class Sampling(Settings):
    """What one image is asked to be. None leaves a value to the model."""

    prompt: Prompt
    negative_prompt: Prompt | None = None
    seed: Seed | None = None
    steps: Steps | None = None
    guidance_scale: Guidance | None = None
    width: Size | None = None
    height: Size | None = None
    image: tuple[FilePath, ...] | None = None
    mask: FilePath | None = None
    control: FilePath | None = None
    strength: Annotated[float, Field(ge=0, le=1)] | None = None
    frames: Annotated[int, Field(ge=1, le=10_000)] | None = None
    fps: Annotated[float, Field(ge=1, le=240)] | None = None

    @field_validator("image", mode="before")
    @classmethod
    def _one_is_a_list(cls, image: Any) -> Any:
        return [image] if isinstance(image, str) else image

    @property
    def pictures(self) -> list[tuple[str, str]]:
        """The option and the file of each picture that is drawn from."""
        named = [*(("image", path) for path in self.image or ()), ("mask", self.mask), ("control", self.control)]
        return [(option, path) for option, path in named if path is not None]

    @field_validator("prompt")
    @classmethod
    def _says_something(cls, prompt: str) -> str:
        if not prompt.strip():
            raise ValueError("the prompt is empty; say what to draw")
        return prompt


class Replay(Sampling):
    """Everything an image was made with. What lies on somebody's disk is named without its path: a model as
    `./<directory>`, pictures and LoRA by their file names."""

    seed: Seed
    steps: Steps
    width: Size | None  # a sound has none
    height: Size | None
    drawn_from: dict[str, str] = Field({}, description="fingerprints of the pictures that it was drawn from, by name")
    outfit: dict[str, Any] = Field({}, description="scheduler, LoRA and what else was put on the model")
    model: str = Field(max_length=300)
    scheduler: str = Field(max_length=100)
    dtype: str = Field(max_length=20)
    config: dict[str, Any]
    report: dict[str, Any]
    versions: dict[str, str]
    job: str | None = Field(None, max_length=100, description="which picture of a resumable job this is")

    @property
    def local(self) -> bool:
        """Was the model a local directory, which nobody else can find by its name?"""
        return self.model.startswith("./")


def sentence(error: ValidationError) -> str:
    """Each mistake with the value that made it."""
    said = []
    for item in error.errors(include_url=False):
        if item["type"] == "value_error":
            said.append(str(item["ctx"]["error"]))
        else:
            where = ".".join(str(part) for part in item["loc"])
            shown = "" if item["type"] == "missing" else f" = {str(item['input'])[:60]}"
            said.append(f"{where}{shown}: {item['msg'][0].lower()}{item['msg'][1:]}")
    return "; ".join(said)


def parameters(made: Replay) -> str:
    """The text that the A1111 family of tools writes and reads."""
    negative = [f"Negative prompt: {made.negative_prompt}"] if made.negative_prompt else []
    fields = {
        "Steps": made.steps,
        "Sampler": made.scheduler.removesuffix("Scheduler"),
        "CFG scale": made.guidance_scale,
        "Seed": made.seed,
        "Size": f"{made.width}x{made.height}" if made.width else None,
        "Model": made.model.removeprefix("./"),
    }
    return "\n".join([made.prompt, *negative, ", ".join(f"{k}: {v}" for k, v in fields.items() if v is not None)])


def save(image: Image.Image, path: Path, made: Replay | None = None, *, overwrite: bool = False) -> Path:
    """Write a PNG, whole or not at all, and return its path; `put` says how."""
    return put(lambda file: file.write(encode(image, made)), path, overwrite=overwrite)


def put(fill: Callable[[IO[bytes]], object], path: Path, *, overwrite: bool = False) -> Path:
    """Write what `fill` writes, whole or not at all, and return its path.

    A name that is taken gets a number, unless `overwrite`. Raises FastdiffError if it cannot be written.
    """
    temporary = path.with_name(f".{path.stem[:40]}-{secrets.token_hex(4)}.partial")
    try:
        with temporary.open("xb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        return temporary.replace(path) if overwrite else _place(temporary, path)
    except OSError as error:
        raise FastdiffError(f"{str(path)!r} cannot be written: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def encode(image: Image.Image, made: Replay | None = None) -> bytes:
    """The PNG that `save` would write."""
    buffer = io.BytesIO()
    # a copy: Pillow keeps the chunks on the image while it saves, where another thread would pick them up
    image.copy().save(buffer, "PNG", pnginfo=_chunks(made) if made else None)
    return buffer.getvalue()


def read(path: Path) -> Replay:
    """What a PNG of ours was made with; no pixel is decoded. Raises FastdiffError for any other file."""
    return parse(chunk(path), path)


def parse(text: str, path: Path) -> Replay:
    """The settings that were found in a file."""
    try:
        return Replay.model_validate(json.loads(text))
    except ValidationError as error:
        raise FastdiffError(f"the fastdiff settings in {str(path)!r} do not hold: {sentence(error)}") from None
    except (ValueError, RecursionError):
        raise FastdiffError(f"the fastdiff settings in {str(path)!r} are not JSON; the file was damaged") from None


def chunk(path: Path) -> str:
    """The settings in a PNG, as text."""
    with reading(path, "PNG") as image:
        text = image.info.get(CHUNK)
    if not isinstance(text, str):
        raise FastdiffError(f"{str(path)!r} carries no fastdiff settings; it was not made by fastdiff, or was stripped")
    if len(text) > MAX_CHUNK:
        raise FastdiffError(f"the fastdiff settings in {str(path)!r} are over {MAX_CHUNK >> 20} MiB; refused")
    return text


def _chunks(made: Replay) -> PngImagePlugin.PngInfo:
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("parameters", parameters(made))
    chunks.add_text(CHUNK, made.model_dump_json(ensure_ascii=True))
    return chunks


def numbered(path: Path) -> Iterator[Path]:
    """out.png, out-1.png, out-2.png, ..."""
    yield path
    for number in itertools.count(1):
        yield path.with_name(f"{path.stem}-{number}{path.suffix}")


def _place(temporary: Path, path: Path) -> Path:
    for target in numbered(path):
        with contextlib.suppress(FileExistsError):
            _claim(temporary, target)
            return target
    raise AssertionError("numbers do not end")


def _claim(temporary: Path, target: Path) -> None:
    """Give the file a name that nobody has; raises FileExistsError, whoever else is writing just now."""
    try:
        os.link(temporary, target)  # unlike a rename, never replaces
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links: reserve the name, then fill it
        target.open("xb").close()
        try:
            temporary.replace(target)
        except BaseException:
            target.unlink()
            raise
