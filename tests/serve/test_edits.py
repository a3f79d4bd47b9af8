"""Edits: pictures that clients send, drawn over everywhere or where the mask says so; and OpenAI's client, strictly."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image

from fastdiff.images import CHUNK, Replay
from fastdiff.serve.app import Options
from fastdiff.serve.written import preset_of

from .conftest import LIMITS, Server, serving, shelf

GENERATE: dict[str, Any] = {  # what the client's own tests send
    "prompt": "A cute baby sea otter", "background": "transparent", "model": "gpt-image-2", "moderation": "low", "n": 1,
    "output_compression": 100, "output_format": "png", "partial_images": 1, "quality": "medium",
    "response_format": "url", "size": "auto", "style": "vivid", "user": "user-1234",
}  # fmt: skip
EDIT: dict[str, Any] = {
    "prompt": "A cute baby sea otter wearing a beret", "background": "transparent", "input_fidelity": "high",
    "model": "gpt-image-2", "n": 1, "output_compression": 100, "output_format": "png", "partial_images": 1,
    "quality": "high", "response_format": "url", "size": "256x256", "user": "user-1234",
}  # fmt: skip


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def photo(size: tuple[int, int] = (64, 48)) -> bytes:
    shades = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), np.uint8)
    return png(Image.fromarray(shades))


def hole(size: tuple[int, int] = (64, 48)) -> bytes:
    """See-through on the left."""
    made = Image.new("RGBA", size, (0, 0, 0, 255))
    made.paste((0, 0, 0, 0), (0, 0, size[0] // 2, size[1]))
    return png(made)


def opened(data: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(data)))


@pytest.fixture(scope="module")
def known(model: str):
    """A server that has the names and sizes of OpenAI's models."""
    presets = {name: shelf([name], [], [])[name] for name in ("balanced", "lossless")}
    limits = LIMITS.model_copy(update={"side": 256})
    with serving(Options(model, presets, limits=limits, aliases=["gpt-image-2", "gpt-image-1"])) as found:
        yield found


@pytest.fixture(scope="module")
def strict(known: Server):
    found = openai.OpenAI(
        base_url=f"{known.url}/v1", api_key="unused", max_retries=0, _strict_response_validation=True,
    )  # fmt: skip
    with found:
        yield found


FEW = {"extra_body": {"steps": 2, "seed": 1}}


@pytest.mark.parametrize("asked", [{"prompt": "A cute baby sea otter"}, GENERATE], ids=["least", "all"])
def test_the_requests_of_the_official_client_s_tests(strict: openai.OpenAI, asked: dict[str, Any]) -> None:
    reply = strict.images.generate(**asked, **FEW)
    (picture,) = reply.data
    data = picture.b64_json or picture.url.removeprefix("data:image/png;base64,")
    raw = strict.images.with_raw_response.generate(**asked, **FEW)
    with strict.images.with_streaming_response.generate(**asked, **FEW) as response:
        for same in (raw.parse(), response.parse()):
            assert (same.data[0].b64_json, same.data[0].url) == (picture.b64_json, picture.url)
    events = list(strict.images.generate(**asked, **FEW, stream=True))
    kinds = [event.type for event in events]
    assert kinds == ["image_generation.partial_image"] * (asked is GENERATE) + ["image_generation.completed"]
    assert (events[-1].b64_json, events[-1].usage.total_tokens) == (data, reply.usage.total_tokens)
    assert (reply.quality, reply.background) == (
        ("medium", "transparent") if asked is GENERATE else ("medium", "opaque")
    )
    assert opened(data).mode == ("RGBA" if asked is GENERATE else "RGB")


@pytest.mark.parametrize("asked", [{"prompt": "an otter"}, EDIT], ids=["least", "all"])
def test_the_edits_of_the_official_client_s_tests(strict: openai.OpenAI, asked: dict[str, Any]) -> None:
    files = {"image": photo(), **({"mask": hole()} if asked is EDIT else {})}
    reply = strict.images.edit(**asked, **files, **FEW)
    events = list(strict.images.edit(**asked, **files, **FEW, stream=True))
    assert events[-1].type == "image_edit.completed"
    data = (reply.data[0].b64_json or reply.data[0].url).removeprefix("data:image/png;base64,")
    assert events[-1].b64_json == data
    assert reply.usage.input_tokens_details.image_tokens > 0
    assert opened(data).size == ((256, 256) if asked is EDIT else (64, 48))


def test_an_edit_says_how_it_was_made(server: Server) -> None:
    status, reply = server.edit({"image": photo(), "mask": hole()}, steps=4, strength=0.75, n=2)
    made = [Replay.model_validate(json.loads(opened(one["b64_json"]).info[CHUNK])) for one in reply["data"]]
    assert (status, [(m.image, m.mask, m.strength) for m in made]) == (200, [(("image-1",), "mask", 0.75)] * 2)
    assert (made[0].width, made[0].height, made[0].report["steps"]) == (64, 48, 3)


def test_only_what_the_mask_leaves_open_is_drawn(server: Server) -> None:
    """A picture of one colour, whose right half is held: it is no other than what it was."""
    plain = png(Image.new("RGB", (64, 64), (90, 140, 60)))
    reply = server.edit({"image": plain, "mask": hole((64, 64))}, steps=6, strength=1.0)[1]
    whole = server.edit({"image": plain}, steps=6, strength=1.0)[1]
    assert reply["data"][0]["b64_json"] != whole["data"][0]["b64_json"]
    still = server.edit({"image": plain}, steps=6, strength=0.17)[1]
    right = [np.asarray(opened(r["data"][0]["b64_json"]), np.int16)[:, 48:] for r in (reply, whole, still)]
    assert np.abs(right[0] - right[2]).mean() < np.abs(right[1] - right[2]).mean()


@pytest.mark.parametrize("kind", ["png", "webp", "jpeg"])
def test_formats(server: Server, kind: str) -> None:
    reply = server.draw(output_format=kind)[1]
    sizes = [len(server.draw(output_format=kind, output_compression=q)[1]["data"][0]["b64_json"]) for q in (100, 10)
             if kind != "png"]  # fmt: skip
    assert (opened(reply["data"][0]["b64_json"]).format, reply["output_format"]) == (kind.upper(), kind)
    assert sizes == sorted(sizes, reverse=True)
    assert server.draw(output_format=kind, response_format="url")[1]["data"][0]["url"].startswith(f"data:image/{kind};")


def test_a_quality_is_the_nearest_preset() -> None:
    every = ("balanced", "lossless", "fast")
    assert [preset_of(q, every) for q in ("low", "medium", "standard", "high", "hd", "max")] == [
        "fast", "balanced", "balanced", "lossless", "lossless", "lossless",
    ]  # fmt: skip
    assert [preset_of(q, ("balanced", "own")) for q in ("low", "high", "auto")] == ["balanced", "balanced", None]
    assert [preset_of(q, ("fast", "lossless")) for q in ("medium", "low")] == ["lossless", "fast"]
    assert preset_of("high", ("own",)) is None


REFUSED = {
    "no image": ({}, {}, 400, "image: field required"),
    "no picture": ({"image": b"Example data"}, {}, 400, "image: no PNG, WebP or JPEG that can be read"),
    "a mask that hides nothing": ({"image": photo(), "mask": photo()}, {}, 400, "mask: it has no transparency"),
    "a mask of another size": ({"image": photo(), "mask": hole((8, 8))}, {}, 400, "mask: 8x8, but the first image has"),
    "two images": ({"image": [photo(), photo()]}, {}, 400, "draws over one picture; give one image, this has 2"),
    "another file": ({"image": photo(), "markup": photo()}, {}, 400, "markup: no such file is taken here"),
    "no strength": ({"image": photo()}, {"strength": 2}, 400, "strength = 2: input should be less than or equal to 1"),
    "svg": ({"image": photo()}, {"output_format": "svg"}, 400, "output_format = svg"),
    "complexity": ({"image": photo()}, {"complexity": "low"}, 400, "complexity = low: extra inputs are not permitted"),
    "a model": ({"image": photo()}, {"model": "dall-e-2"}, 404, "this server has no model 'dall-e-2'"),
    "a lossy PNG": ({"image": photo()}, {"output_compression": 50}, 400, "a PNG loses nothing"),
    "a JPEG one sees through": (
        {"image": photo()}, {"output_format": "jpeg", "background": "transparent"}, 400, "background = transparent",
    ),
    "a LoRA": ({"image": photo()}, {"lora": "style"}, 400, "lora = style: this server has none"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_edits(server: Server, case: str) -> None:
    files, fields, status, message = REFUSED[case]
    found, reply = server.edit(files, **fields)
    assert (found, message in reply["error"]["message"]) == (status, True), reply
    assert "/tmp" not in reply["error"]["message"]


def test_json_is_no_form(server: Server) -> None:
    status, reply = server.call("/v1/images/edits", {"prompt": "a cat"})
    assert (status, reply["error"]["message"]) == (
        415, "the content type is application/json; send multipart/form-data",
    )  # fmt: skip
