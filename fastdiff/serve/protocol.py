"""What goes over the wire beside requests: limits, replies and errors in the shape of OpenAI's API."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from fastdiff.method import Settings

MAX_BODY = 1 << 20  # bytes; two prompts of the longest kind, every character escaped, take half of it
MAX_UPLOAD = 64 << 20  # of forms with pictures
MAX_PICTURES = 16  # as in OpenAI's API
MAX_PIXELS = 50_000_000  # of a picture that is sent


class Limits(Settings):
    """What one client may ask of a server, in images, pixels a side, steps, waiting requests and seconds; and how
    many are drawn in turns."""

    images: int = Field(4, ge=1)
    side: int = Field(2048, ge=8)
    steps: int = Field(200, ge=1)
    queue: int = Field(16, ge=1)
    timeout: float = Field(300.0, gt=0)
    grace: float = Field(30.0, ge=0)
    in_progress: int = Field(4, ge=1)


class Problem(Exception):
    """A request that is not answered with pictures; `status` is HTTP's, `code` names the reason for programs."""

    def __init__(self, status: int, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    def body(self) -> dict[str, Any]:
        """The shape of errors that clients of OpenAI's API understand, in one line: what clients sent is in it."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        message = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(self))
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}


class Picture(BaseModel):
    """A picture, which says itself how it was made, and what the run did."""

    b64_json: str | None = None
    url: str | None = None
    revised_prompt: str | None = None
    seed: int
    seconds: float
    prompt_cut: bool = Field(description="the model read only the beginning of the prompt")
    report: dict[str, Any]


class ImagesReply(BaseModel):
    created: int
    data: list[Picture]
    background: Literal["transparent", "opaque"]
    output_format: Literal["png", "webp", "jpeg"]
    quality: Literal["low", "medium", "high"] | None
    size: str
    safety_identifier: str | None
    usage: dict[str, Any]


class Mistake(BaseModel):
    message: str
    type: str
    param: str | None
    code: str


class ErrorReply(BaseModel):
    error: Mistake


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "fastdiff"


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class Health(BaseModel):
    status: Literal["ok", "closing"]
    model: str
    drawing: bool
    waiting: int
