"""How pictures leave the server: format, compression, background; and what OpenAI's API says of them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from fastdiff import media
from fastdiff.images import Replay, Sampling
from fastdiff.studio import pictures
from fastdiff.studio.drawing import Drawn, Studio

from .bodies import ImageRequest
from .protocol import Problem

_SAME_EACH_TIME = ("steps", "computed", "cached", "partly")  # of a report; seconds and memory are not
_SUFFIX = {"png": ".png", "webp": ".webp", "jpeg": ".jpg"}
_PRESETS = {"low": "fast", "medium": "balanced", "high": "lossless"}  # what a quality stands for
_SAME = {"standard": "medium", "hd": "high", "xhigh": "high", "max": "high"}
_NEAR = 24  # of 255, by which a colour may differ from the edge's and still be background


def preset_of(quality: str, served: Collection[str]) -> str | None:
    """The served preset nearest to a quality, the better of two; None leaves it to the server."""
    wanted, order = _SAME.get(quality, quality), list(_PRESETS)
    known = [level for level in reversed(order) if _PRESETS[level] in served]
    if wanted not in order or not known:
        return None
    return _PRESETS[min(known, key=lambda level: abs(order.index(level) - order.index(wanted)))]


@dataclass(frozen=True)
class Form:
    """What is made of a picture that was drawn."""

    format: str = "png"
    quality: int | None = None  # of WebP and JPEG
    background: str = "opaque"
    as_url: bool = False
    level: str | None = None  # the quality that the preset stands for
    safety_identifier: str | None = None

    @classmethod
    def of(cls, body: ImageRequest, preset: str) -> Form:
        """Raises Problem for what no such file can be."""
        kept = body.output_compression
        if body.output_format == "png" and kept not in (None, 100):
            why = (
                f"output_compression = {kept}: a PNG loses nothing; leave it out, or ask for output_format webp or jpeg"
            )
            raise Problem(400, "refused", why, "output_compression")
        if body.output_format == "jpeg" and body.background == "transparent":
            why = "background = transparent: a JPEG has no transparency; ask for output_format png or webp"
            raise Problem(400, "refused", why, "background")
        background = "transparent" if body.background == "transparent" else "opaque"
        level = next((level for level, name in _PRESETS.items() if name == preset), None)
        quality = None if kept is None or body.output_format == "png" else max(kept, 1)
        told = body.safety_identifier or body.user
        return cls(body.output_format, quality, background, body.response_format == "url", level, told)

    def written(self, drawn: Drawn) -> bytes:
        """The same bytes each time: with the settings, without the seconds of this run."""
        report = {name: drawn.made.report[name] for name in _SAME_EACH_TIME}
        made = drawn.made.model_copy(update={"report": report})
        if not isinstance(drawn.image, Image.Image):
            return media.encode(drawn.image, media.suffix(drawn.image), made)
        return self.encode(drawn.image, made)

    def encode(self, image: Image.Image, made: Replay | None = None) -> bytes:
        image = cut_out(image) if self.background == "transparent" else image
        return media.encode(image, _SUFFIX[self.format], made, self.quality)

    def shown(self, data: str) -> dict[str, str]:
        """Base64, or a URL that holds the picture itself: the server keeps no files that one could point to."""
        return {"url": f"data:image/{self.format};base64,{data}"} if self.as_url else {"b64_json": data}

    def about(self, size: str) -> dict[str, Any]:
        """What a reply says of all its pictures."""
        said = {"background": self.background, "output_format": self.format, "quality": self.level, "size": size}
        return said | {"safety_identifier": self.safety_identifier}

    def event(self, size: str) -> dict[str, Any]:
        """What each event of a stream says."""
        return self.about(size) | {"quality": self.level or "auto"}


def cut_out(image: Image.Image) -> Image.Image:
    """See-through wherever the colour is nearly that of the picture's edge."""
    pixels = np.asarray(image.convert("RGB")).astype(np.int16)
    edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    far = np.abs(pixels - np.median(edge, axis=0)).max(-1) > _NEAR
    made = image.convert("RGB")
    made.putalpha(Image.fromarray((far * 255).astype(np.uint8)))
    return made


def tokens(studio: Studio, job: Sampling, size: tuple[int, int]) -> tuple[int, int, int]:
    """Of the text as the model's tokenizer counts them; of the pictures that were given, and of the one that was made,
    one for each patch of the denoiser."""
    reads = next((found for name in ("tokenizer", "tokenizer_2") if (found := getattr(studio.pipe, name, None))), None)
    step = pictures.multiple(studio.pipe)
    image = (size[0] // step) * (size[1] // step)
    return len(reads(job.prompt).input_ids) if reads else 0, image * len(job.pictures), image


def usage(counts: Sequence[tuple[int, int, int]]) -> dict[str, Any]:
    """What OpenAI's API says of the tokens of some pictures."""
    text, given, made = map(sum, zip(*counts, strict=True))
    return {
        "input_tokens": text + given,
        "input_tokens_details": {"text_tokens": text, "image_tokens": given},
        "output_tokens": made,
        "output_tokens_details": {"text_tokens": 0, "image_tokens": made},
        "total_tokens": text + given + made,
    }
