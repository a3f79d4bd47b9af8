"""What every request passes before anything looks at it: the key, the size of its body, the time that takes."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import Collection
from pathlib import Path

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastdiff.errors import BadConfig

from .protocol import MAX_BODY, MAX_UPLOAD, Problem

_FORMS = ("/v1/images/edits", "/v1/videos")  # which bring pictures
_OPEN = ("/health", "/openapi.json")  # no key needed
_SLOW = 30.0  # seconds that a body may take
_MIN_KEY = 16  # characters


class Door:
    """ASGI middleware. `keys` are digests; none lets everybody in."""

    def __init__(self, app: ASGIApp, keys: Collection[bytes]) -> None:
        self.app, self.keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        most = MAX_UPLOAD if scope["path"] in _FORMS else MAX_BODY
        try:
            if self.keys and scope["path"] not in _OPEN:
                self._check_key(Headers(scope=scope))
            body = await asyncio.wait_for(_read(receive, most), _SLOW)
        except asyncio.TimeoutError:
            problem = Problem(408, "slow", f"the body did not arrive within {_SLOW:g} s")
        except Problem as found:
            problem = found
        else:
            if body is not None:
                await self.app(scope, _again(body, receive), send)
            return
        headers = {"connection": "close"} | ({"www-authenticate": "Bearer"} if problem.status == 401 else {})
        await JSONResponse(problem.body(), problem.status, headers)(scope, receive, send)

    def _check_key(self, headers: Headers) -> None:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        found = digest(key.strip())
        if scheme.lower() != "bearer" or not any(hmac.compare_digest(found, known) for known in self.keys):
            raise Problem(401, "invalid_api_key", "this server wants a key: Authorization: Bearer KEY")


async def _read(receive: Receive, most: int) -> bytes | None:
    """The whole body; None if the client went away. Raises Problem 413 for one that is too long."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        if len(body) > most:
            raise Problem(413, "too_large", f"the body is over {most >> 20} MiB")
        if not message.get("more_body", False):
            return bytes(body)


def _again(body: bytes, receive: Receive) -> Receive:
    """Hands the body on, then tells what else comes: that the client is gone."""
    told = False

    async def heard() -> Message:
        nonlocal told
        if told:
            return await receive()
        told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return heard


def digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def read_keys(file: Path) -> frozenset[bytes]:
    """Digests of the keys in a file, one a line. Raises BadConfig for a file without keys, or with weak ones."""
    try:
        keys = file.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise BadConfig(f"--api-key-file {file} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not keys:
        raise BadConfig(f"--api-key-file {file} holds no key; put one in each line")
    if short := next((n for n, key in enumerate(keys, 1) if len(key) < _MIN_KEY), None):
        raise BadConfig(f"--api-key-file {file}: key {short} has fewer than {_MIN_KEY} characters; make a longer one")
    return frozenset(map(digest, keys))
