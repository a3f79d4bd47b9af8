"""Forms as no client should send them: each gets a 4xx that says why in one sentence, and the server goes on."""

from __future__ import annotations

import http.client
import io
import json
import random
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

import pytest
from PIL import Image

from fastdiff.serve.uploads import EditRequest
from fastdiff.serve.videos import VideoRequest

from .conftest import Server
from .test_edits import hole, photo

BOUNDARY = b"a-boundary"
TEXTS = (
    b"", b"1", b"-1", b"0", b"1e999", b"nan", b"9" * 40, b"true", b"null", b"[]", b'{"a": 1}', b"auto", b"65x65",
    b"8x8", b"99999x1", b"\x00", b"\xff\xfe", "\N{SNOWMAN}\N{GRINNING FACE}".encode(), b"x" * 5000, b"../../etc/passwd",
    b"png", b"jpeg", b"transparent", b"high", b"0.5", b"no-such-name:2", b"line\r\nline", b"\xed\xa0\x80",
)  # fmt: skip
NAMES = sorted({*EditRequest.model_fields, *VideoRequest.model_fields, "image", "mask", "image[]", "", "[]",
                "_charset_", "num_inference_steps", "complexity", "x" * 300, "pro\x00mpt"})  # fmt: skip


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def drawn(mode: str, size: tuple[int, int] = (64, 64), form: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new(mode, size).save(file, form)
    return file.getvalue()


def hollow(width: int, height: int) -> bytes:
    """A PNG that says it is large, and holds nothing."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def oriented(exif: bytes) -> bytes:
    """A photo whose EXIF nobody can be sure of."""
    whole = photo()
    return whole[:33] + chunk(b"eXIf", exif) + whole[33:]


PICTURES = [
    photo(), hole(), b"", b"<svg xmlns='http://www.w3.org/2000/svg'/>", photo()[:200], photo()[:-20],
    hollow(60000, 60000), hollow(7000, 7000), hollow(0, 0), hollow(64, 64), drawn("1"), drawn("L", (1, 1)),
    drawn("P"), drawn("LA"), drawn("RGB", (3000, 2)), drawn("I;16"), drawn("CMYK", form="JPEG"),
    drawn("L", form="JPEG")[:150],
    drawn("RGBA", form="WEBP"), drawn("RGBA", form="WEBP")[:40], drawn("RGB", form="GIF"), drawn("RGB", form="TIFF"),
    oriented(b"MM\x00*\x00\x00\x00\x08\xff\xff"), oriented(b"II*\x00\x08\x00\x00\x00\x01\x00\x12\x01\x0a\x00"),
    b"\x00" * 70_000,
]  # fmt: skip
HEADERS = (
    b"Content-Type: text/plain; charset=no-such\r\n", b"X" * 9000 + b": y\r\n", b"no colon\r\n",
    b"Content-Length: 5\r\n",
)  # fmt: skip


@dataclass
class Part:
    name: bytes
    data: bytes
    file: bytes | None = None
    more: bytes = b""

    def written(self) -> bytes:
        file = b"" if self.file is None else b'; filename="' + self.file + b'"'
        head = b'Content-Disposition: form-data; name="' + self.name + b'"' + file + b"\r\n" + self.more
        return b"--" + BOUNDARY + b"\r\n" + head + b"\r\n" + self.data + b"\r\n"


def broken(picture: bytes, chance: random.Random) -> bytes:
    """Some bytes of it are others."""
    found = bytearray(picture)
    for _ in range(min(len(found), chance.choice((1, 4, 40)))):
        found[chance.randrange(len(found))] = chance.randrange(256)
    return bytes(found)


def another(parts: list[Part], chance: random.Random) -> None:
    """Change one thing of a form."""
    one = chance.choice(parts) if parts else Part(b"prompt", b"a cat")
    name, text, picture = chance.choice(NAMES).encode(), chance.choice(TEXTS), chance.choice(PICTURES)
    changes: tuple[Callable[[], object], ...] = (
        lambda: parts.append(Part(name, text)),
        lambda: parts.append(Part(name, text)),
        lambda: parts.append(Part(name, picture, chance.choice((b"a.png", b"", b"../../a", b"\xff")))),
        lambda: parts.append(Part(b"mask", chance.choice((hole(), picture)), b"mask.png")),
        lambda: setattr(one, "data", broken(one.data, chance)),
        lambda: setattr(one, "data", picture),
        lambda: setattr(one, "name", name),
        lambda: setattr(one, "file", None if one.file else b"a.txt"),
        lambda: setattr(one, "more", chance.choice(HEADERS)),
        lambda: parts.remove(one) if one in parts else None,
        lambda: parts.append(one),
        lambda: parts.extend([Part(chance.choice(NAMES).encode(), b"1")] * 70),
        lambda: parts.extend([Part(b"image", picture, b"a.png")] * chance.choice((1, 15, 40))),
    )  # fmt: skip
    chance.choice(changes)()


def made(chance: random.Random) -> tuple[bytes, str]:
    """A body and its content type."""
    image = photo() if chance.random() < 0.5 else broken(chance.choice(PICTURES), chance)
    parts = [Part(b"prompt", b"a cat"), Part(b"image", image, b"a.png"), Part(b"steps", b"2"), Part(b"seed", b"1")]
    for _ in range(chance.choice((0, 1, 2, 3))):
        another(parts, chance)
    body, kind = b"".join(part.written() for part in parts) + b"--" + BOUNDARY + b"--\r\n", BOUNDARY.decode()
    if chance.random() < 0.1:
        body = chance.choice((body[: chance.randrange(len(body))], broken(body, chance), b"", b"\r\n" + body, body * 2))
    if chance.random() < 0.1:
        kind = chance.choice(("another", "", "x" * 300, '"', "a-boundary; charset=no-such"))
    return body, f"multipart/form-data; boundary={kind}"


@pytest.mark.parametrize("path", ["/v1/images/edits", "/v1/videos"])
def test_made_up_forms(server: Server, path: str) -> None:
    chance = random.Random(0)
    told = set()
    for number in range(200 if path.endswith("edits") else 50):
        body, kind = made(chance)
        link = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=900)
        link.request("POST", path, body, {"content-type": kind})
        answer = link.getresponse()
        text = answer.read()
        link.close()
        assert answer.status == 200 or 400 <= answer.status < 500, (number, text)
        assert b"server_error" not in text, number  # which a stream says with status 200
        if answer.status != 200:
            message = json.loads(text)["error"]["message"]
            assert 3 < len(message) < 700 and message.isprintable() and "/tmp" not in message, (number, message)
            told.add(message.split(":")[0])
    assert len(told) > (20 if path.endswith("edits") else 5)
    assert server.draw()[0] == 200


def test_many_large_pictures_are_refused_before_any_is_held(server: Server) -> None:
    large = drawn("1", (6000, 6000))
    status, reply = server.edit({"image": [large, large]})
    assert (status, reply["error"]["message"]) == (400, "image: over 50 million pixels; send less")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": ["a cat", "a dog"]}, "prompt: it is there more than once; give it once"),
        ({"mask": "a text"}, "mask: it is text here; send a file, with a name"),
    ],
)
def test_forms_that_contradict_themselves(server: Server, fields: dict[str, object], message: str) -> None:
    status, reply = server.edit({"image": photo()}, **fields)
    assert (status, reply["error"]["message"]) == (400, message)


def test_one_mask_is_enough(server: Server) -> None:
    status, reply = server.edit({"image": photo(), "mask": [hole(), hole()]})
    assert (status, reply["error"]["message"]) == (400, "mask: 2 of them; give one, for the first image")
