"""What a client gets: pictures, models, streams, and errors in the shape that OpenAI's client knows."""

from __future__ import annotations

import base64
import inspect
import io
import json
import sys
import threading
from pathlib import Path

import openai
import pytest
from PIL import Image

from fastdiff.images import CHUNK, Replay

from .conftest import Server


@pytest.fixture(scope="module")
def client(server: Server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as found:
        yield found


def opened(data: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_official_client(client) -> None:
    extra = {"seed": 7, "steps": 4, "guidance_scale": 2.0, "negative_prompt": "dog", "preset": "cached"}
    reply = client.images.generate(model="tiny-sd", prompt="a cat", n=2, size="48x64", extra_body=extra)
    first, second = reply.data
    made = [Replay.model_validate(json.loads(opened(p.b64_json).info[CHUNK])) for p in (first, second)]
    assert [(m.prompt, m.seed, m.steps, m.width, m.height) for m in made] == [("a cat", s, 4, 48, 64) for s in (7, 8)]
    assert (made[0].guidance_scale, made[0].negative_prompt, made[0].config["cache"]["interval"]) == (2.0, "dog", 2)
    assert opened(first.b64_json).size == (48, 64)
    assert first.b64_json != second.b64_json
    assert (first.seed, first.report["computed"], first.report["cached"], first.prompt_cut) == (7, 2, 2, False)
    assert reply.size == "48x64"


def test_null_means_not_given(client, server: Server) -> None:
    """Clients that have a field for everything send null for what nobody filled in, also for fields we do not have."""
    known = inspect.signature(client.images.generate).parameters.keys()
    nothing = dict.fromkeys(known - {"prompt", "extra_headers", "extra_query", "extra_body", "timeout"})
    assert {"n", "size", "stream", "partial_images", "quality"} <= nothing.keys()
    own = dict.fromkeys(["negative_prompt", "guidance_scale", "preset", "config", "steps"])
    reply = client.images.generate(prompt="a cat", **nothing, extra_body=own | {"seed": 1, "num_inference_steps": 1})
    assert reply.data[0].b64_json == server.draw()[1]["data"][0]["b64_json"]


def test_every_field_may_be_null(server: Server) -> None:
    schema = server.call("/openapi.json")[1]["components"]["schemas"]["ImageRequest"]
    fields = schema["properties"].keys() - {"prompt"}
    for name in fields:
        assert {"type": "null"} in schema["properties"][name]["anyOf"], name
    assert server.draw(**(dict.fromkeys(fields) | {"steps": 1}))[0] == 200
    status, reply = server.draw(prompt=None)
    assert (status, reply["error"]["message"]) == (400, "prompt: field required")


@pytest.mark.parametrize("kind", ["application/x-www-form-urlencoded", "text/plain", "multipart/form-data", ""])
def test_a_body_that_does_not_say_it_is_json(server: Server, kind: str) -> None:
    """What curl -d sends without -H, for one."""
    status, reply = server.call("/v1/images/generations", {"prompt": "a cat", "steps": 1}, content_type=kind)
    said = f"the content type is {kind or 'not given'}; send JSON, with the header Content-Type: application/json"
    assert (status, reply["error"]["code"], reply["error"]["message"]) == (415, "unsupported_media_type", said)


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "application/vnd.api+json"])
def test_other_names_of_json(server: Server, kind: str) -> None:
    body = {"prompt": "a cat", "steps": 1}
    assert server.call("/v1/images/generations", body, content_type=kind)[0] == 200


def test_models(client) -> None:
    assert [model.id for model in client.models.list()] == ["tiny-sd"]
    assert client.models.retrieve("tiny-sd").owned_by == "fastdiff"
    for name in ("other", "../tiny-sd", "/etc/passwd"):
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve(name)


def test_stream(client) -> None:
    asked = {"prompt": "a cat", "extra_body": {"seed": 3, "steps": 6}}
    plain = client.images.generate(**asked).data[0]
    asked["extra_body"] |= {"progress": True}
    events = list(client.images.generate(**asked, stream=True, partial_images=2))
    kinds = [event.type.removeprefix("image_generation.") for event in events]
    assert kinds.count("progress") == 6
    assert [(e.step, e.steps) for e in events if e.type.endswith("progress")] == [(n, 6) for n in range(1, 7)]
    previews = [event for event in events if event.type.endswith("partial_image")]
    assert [event.partial_image_index for event in previews] == [0, 1]
    assert opened(previews[0].b64_json).size == (32, 32)
    assert kinds[-1] == "completed"
    assert events[-1].b64_json == plain.b64_json


def test_same_seed_same_bytes(server: Server) -> None:
    first = server.draw(steps=3)[1]["data"][0]["b64_json"]
    for between in ({"preset": "cached", "steps": 4}, {"size": "32x64"}, {"prompt": "a dog", "guidance_scale": 1.0}):
        assert server.draw(**between)[1]["data"][0]["b64_json"] != first
        assert server.draw(steps=3)[1]["data"][0]["b64_json"] == first


def test_defaults(server: Server) -> None:
    status, reply = server.call("/v1/images/generations", {"prompt": "word " * 100, "num_inference_steps": 1})
    (picture,) = reply["data"]
    assert (status, picture["prompt_cut"], picture["report"]["steps"]) == (200, True, 1)
    assert picture["seed"] != server.draw(seed=None)[1]["data"][0]["seed"]


BAD = {
    "no prompt": ({"prompt": ""}, 400, "prompt"),
    "blank prompt": ({"prompt": " \n"}, 400, "the prompt is empty"),
    "long prompt": ({"prompt": "x" * 100_000}, 400, "prompt = xxx"),
    "surrogates": ({"prompt": "\ud800"}, 400, "prompt"),
    "number as prompt": ({"prompt": 3}, 400, "prompt = 3: input should be a valid string"),
    "another model": ({"model": "gpt-image-1"}, 404, "no model 'gpt-image-1', only 'tiny-sd'"),
    "path as model": ({"model": "../../etc/passwd"}, 404, "no model '../../etc/passwd'"),
    "path as preset": ({"preset": "/etc/passwd"}, 400, "preset = /etc/passwd: input should be 'lossless' or 'cached'"),
    "preset not allowed": ({"preset": "balanced"}, 400, "input should be 'lossless' or 'cached'"),
    "config as a table": ({"config": {"cache": "fora"}}, 400, "input should be 'lossless' or 'cached'"),
    "too many": ({"n": 3}, 400, "n = 3: input should be less than or equal to 2"),
    "none": ({"n": 0}, 400, "n = 0"),
    "too large": ({"size": "72x8"}, 400, "at most 64 pixels a side"),
    "no size": ({"size": "huge"}, 400, "auto, or WIDTHxHEIGHT in pixels"),
    "odd size": ({"size": "60x64"}, 400, "width 60: this model draws multiples of 8, for example 64"),
    "steps": ({"steps": 401}, 400, "less than or equal to 400"),
    "steps as text": ({"steps": "4"}, 400, "steps = 4: input should be a valid integer"),
    "negative seed": ({"seed": -1}, 400, "seed = -1"),
    "huge seed": ({"seed": 10**30}, 400, "seed = 1000"),
    "seed overflows": ({"seed": 2**63 - 1, "n": 2}, 400, "seed = 9223372036854775808"),
    "guidance": ({"guidance_scale": -1}, 400, "guidance_scale = -1"),
    "truth": ({"n": True}, 400, "n = True"),
    "svg": ({"output_format": "svg"}, 400, "output_format = svg: input should be 'png', 'webp' or 'jpeg'"),
    "compression": ({"output_compression": 101}, 400, "output_compression = 101"),
    "unknown key": ({"sampler": "x"}, 400, "sampler = x: extra inputs are not permitted"),
    "control characters": ({"size": "8x8\x00"}, 400, "size = 8x8"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_requests(server: Server, case: str) -> None:
    body, status, message = BAD[case]
    found, reply = server.draw(**body)
    assert found == status, reply
    assert message in reply["error"]["message"]
    assert set(reply["error"]) == {"message", "type", "param", "code"}
    assert len(reply["error"]["message"]) < 400


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"[" * 50_000, b'{"prompt": NaN}', b'{"n": 1e999}']
)  # fmt: skip
def test_bad_bodies(server: Server, body: bytes) -> None:
    status, reply = server.call("/v1/images/generations", body)
    assert (status, reply["error"]["code"]) in ((400, "invalid"), (400, "http"))


def test_a_body_that_is_no_json_says_where(server: Server) -> None:
    status, reply = server.call("/v1/images/generations", b'{"prompt": }')
    assert (status, reply["error"]["param"]) == (400, None)
    assert reply["error"]["message"] == "the body is no JSON: expecting value at character 11"


def test_what_a_prompt_may_hold(server: Server) -> None:
    for prompt in ("\x00\x1b[31m\r\n", "'; DROP TABLE x; --", '"}, {"', "赤い猫 🔴", "../../etc/passwd", "{{7*7}}%s%n"):
        status, reply = server.draw(prompt=prompt)
        assert status == 200
        assert Replay.model_validate_json(opened(reply["data"][0]["b64_json"]).info[CHUNK]).prompt == prompt


def test_other_routes(server: Server) -> None:
    assert server.call("/v1/images/variations", {})[0] == 404
    assert server.call("/v1/images/generations")[0] == 405
    assert server.call("/docs")[0] == 404  # would load scripts from elsewhere
    assert server.call("/v1/models", host="evil.example")[0] == 400  # DNS rebinding
    assert server.call("/v1/images/generations", b"x" * (2 << 20))[0] == 413
    assert server.call("/health") == (
        200, {"status": "ok", "model": "tiny-sd", "drawing": False, "waiting": 0},
    )  # fmt: skip


def test_a_request_opens_no_file(server: Server) -> None:
    server.draw(preset="cached", n=2)
    server.draw(preset="lossless")
    seen: list[str] = []
    watching = threading.Event()

    def audit(event: str, arguments: tuple) -> None:
        if watching.is_set() and event == "open":
            seen.append(str(arguments[0]))

    sys.addaudithook(audit)  # cannot be taken off; it is silent after this test
    watching.set()
    try:
        Path(__file__).read_bytes()
        server.draw(preset="cached", prompt="/etc/passwd <lora:x:1>", negative_prompt="../x.safetensors")
        server.draw(preset="/etc/passwd", model="/etc/passwd")
        server.call("/v1/models/..%2f..%2fetc%2fpasswd")
    finally:
        watching.clear()
    assert __file__ in seen  # the watch works
    assert not [name for name in seen if "passwd" in name or name.endswith(".safetensors")]


def test_metrics(server: Server) -> None:
    before = [server.metric(name) for name in ("images_total", 'answers_total{status="400"}')]
    server.draw(n=2, steps=4, preset="cached")
    server.draw(n=7)
    after = [server.metric(name) for name in ("images_total", 'answers_total{status="400"}')]
    assert [b - a for a, b in zip(before, after, strict=True)] == [2, 1]
    assert server.metric("waiting") == server.metric("drawing") == 0
    assert server.metric('steps_total{kind="cached"}') >= 4
