"""Multipart forms, as clients send pictures: fields are checked like those of JSON, files are read as pictures."""

from __future__ import annotations

import io
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar, get_origin

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from PIL import Image, ImageOps
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import UploadFile

from .bodies import ImageRequest
from .protocol import MAX_PICTURES, MAX_PIXELS, Problem

B = TypeVar("B", bound=BaseModel)
Files = Mapping[str, Sequence[bytes]]


class EditRequest(ImageRequest):
    """The fields of a form that asks for images drawn over others."""

    model_config = ConfigDict(strict=False)  # a form has only text

    strength: float | None = Field(None, ge=0, le=1, description="how much is drawn anew, where the model takes it")
    input_fidelity: Literal["high", "low"] = Field("low", description="high: a strength of 0.5")

    @property
    def given(self) -> dict[str, Any]:
        """What the form says of the picture that is drawn over."""
        faithful = 0.5 if self.input_fidelity == "high" else None
        return {"strength": faithful if self.strength is None else self.strength}


async def received(request: Request, kind: type[B], names: Sequence[str]) -> tuple[B, Files]:
    """The fields of a form, and its files, which may have these names. Raises Problem for other content."""
    sent = request.headers.get("content-type") or "not given"
    if not sent.startswith("multipart/form-data"):
        raise Problem(415, "unsupported_media_type", f"the content type is {sent}; send multipart/form-data")
    lists = {name for name, field in kind.model_fields.items() if get_origin(field.annotation) is list}
    fields: dict[str, Any] = {}
    files: dict[str, list[bytes]] = defaultdict(list)
    async with request.form(max_files=MAX_PICTURES + 1, max_fields=64) as form:
        for name, value in form.multi_items():
            bare = name.removesuffix("[]")
            if isinstance(value, UploadFile):
                files[bare].append(await value.read())
            elif bare in names:
                raise Problem(400, "invalid", f"{bare}: it is text here; send a file, with a name", bare)
            elif bare in lists:
                fields.setdefault(bare, []).append(value)
            elif bare in fields:
                raise Problem(400, "invalid", f"{bare}: it is there more than once; give it once", bare)
            else:
                fields[bare] = value
    for name in files:
        if name not in names:
            raise Problem(400, "invalid", f"{name}: no such file is taken here, only {' and '.join(names)}", name)
    try:
        return kind.model_validate(fields), files
    except ValidationError as error:
        raise RequestValidationError([{**one, "loc": ("body", *one["loc"])} for one in error.errors()]) from None


def documented(kind: type[BaseModel], files: Mapping[str, bool]) -> dict[str, Any]:
    """For a route's OpenAPI: the fields and files of a form, and whether a file must be there."""
    schema = kind.model_json_schema()
    for name in files:
        schema["properties"][name] = {"type": "string", "format": "binary"}
    schema["required"] = [*schema.get("required", ()), *(name for name, needed in files.items() if needed)]
    return {"requestBody": {"content": {"multipart/form-data": {"schema": schema}}, "required": True}}


def keep(files: Files, folder: tempfile.TemporaryDirectory[str]) -> dict[str, Any]:
    """Pictures as files in a folder, under names of ours: what a `Sampling` calls image and mask.

    Raises Problem for what is no picture, for too many pixels in all, and for a mask without transparency or of another
    size.
    """
    found: dict[str, Any] = {}
    pixels = 0
    for name, sent in files.items():
        for data in sent:
            with _readable(name, data) as picture:
                pixels += picture.width * picture.height
            if pixels > MAX_PIXELS:
                raise Problem(400, "too_large", f"{name}: over {MAX_PIXELS // 10**6} million pixels; send less", name)
    for name, sent in files.items():
        if name == "mask":
            if len(sent) > 1:
                raise Problem(400, "invalid", f"mask: {len(sent)} of them; give one, for the first image", "mask")
            mask = _opened(name, sent[0])
            size = _opened("image", files["image"][0]).size if files.get("image") else mask.size
            path = Path(folder.name, "mask")
            _mask(mask, size).save(path, "PNG")
            found["mask"] = str(path)
            continue
        paths = [Path(folder.name, f"image-{number}") for number in range(1, len(sent) + 1)]
        for path, data in zip(paths, sent, strict=True):
            _opened(name, data)
            path.write_bytes(data)
        found["image"] = tuple(map(str, paths))
    return found


@contextmanager
def _readable(name: str, data: bytes) -> Iterator[Image.Image]:
    try:
        with Image.open(io.BytesIO(data), formats=["PNG", "WEBP", "JPEG"]) as picture:
            yield picture
    except Exception:  # readers of broken files raise what they like
        raise Problem(400, "invalid", f"{name}: no PNG, WebP or JPEG that can be read", name) from None


def _opened(name: str, data: bytes) -> Image.Image:
    with _readable(name, data) as picture:
        return ImageOps.exif_transpose(picture)


def _mask(mask: Image.Image, size: tuple[int, int]) -> Image.Image:
    """White where it is transparent: there the picture is drawn anew."""
    if not mask.has_transparency_data:
        why = "mask: it has no transparency; make see-through what is to be drawn anew"
        raise Problem(400, "invalid", why, "mask")
    if mask.size != size:
        wrong = f"mask: {mask.width}x{mask.height}, but the first image has {size[0]}x{size[1]}; give both one size"
        raise Problem(400, "invalid", wrong, "mask")
    return ImageOps.invert(mask.convert("RGBA").getchannel("A"))
