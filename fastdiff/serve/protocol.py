"""What goes over the wire: the request and the reply of OpenAI's image API, with the extras of diffusion models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, create_model, model_validator

from fastdiff.images import Guidance, Prompt, Seed, Steps
from fastdiff.method import Settings

MAX_BODY = 1 << 20  # bytes; two prompts of the longest kind, every character escaped, take half of it
MAX_PREVIEWS = 3  # as in OpenAI's API


class Limits(Settings):
    """What one client may ask of a server, in images, pixels a side, steps, waiting requests and seconds."""

    images: int = Field(4, ge=1)
    side: int = Field(2048, ge=8)
    steps: int = Field(200, ge=1)
    queue: int = Field(16, ge=1)
    timeout: float = Field(300.0, gt=0)
    grace: float = Field(30.0, ge=0)


class Problem(Exception):
    """A request that is not answered with pictures; `status` is HTTP's, `code` names the reason for programs."""

    def __init__(self, status: int, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    def body(self) -> dict[str, Any]:
        """The shape of errors that clients of OpenAI's API understand; text that is no Unicode is escaped."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        message = str(self).encode("utf-8", "backslashreplace").decode()
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}


def _null_is_allowed(schema: dict[str, Any]) -> None:
    """Says in a JSON schema what `_null_is_not_given` does: whatever may be left out may be null."""
    about = ("title", "description", "default")
    for name, field in schema["properties"].items():
        if name not in schema["required"] and "anyOf" not in field:
            kind = {key: field.pop(key) for key in list(field) if key not in about}
            field["anyOf"] = [kind, {"type": "null"}]
    schema["additionalProperties"] = {"type": "null"}


class ImageRequest(BaseModel):
    """A request for images. What is left out, or null, stays with the model; `size` is its own with "auto"."""

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, json_schema_extra=_null_is_allowed
    )  # fmt: skip

    prompt: Prompt = Field(min_length=1)
    model: str | None = Field(None, max_length=300, description="the served model's name, or nothing")
    n: int = Field(1, ge=1, description="images, with consecutive seeds")
    size: str = Field("auto", pattern=r"^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$", description="auto or WIDTHxHEIGHT")
    response_format: Literal["b64_json"] = Field("b64_json", description="this server keeps no files to link to")
    output_format: Literal["png"] = "png"
    stream: bool = Field(False, description="server-sent events: progress, previews, images")
    partial_images: int = Field(0, ge=0, le=MAX_PREVIEWS, description="previews in a stream, of the first image")
    user: str | None = Field(None, max_length=1000, description="accepted and not used")
    negative_prompt: Prompt | None = None
    seed: Seed | None = Field(None, description="random if left out; the reply says it")
    steps: Steps | None = Field(None, validation_alias=AliasChoices("steps", "num_inference_steps"))
    guidance_scale: Guidance | None = None
    preset: str | None = Field(None, validation_alias=AliasChoices("preset", "config"))

    @model_validator(mode="before")
    @classmethod
    def _null_is_not_given(cls, body: Any) -> Any:
        """Also in fields of OpenAI's that this server does not have: clients fill them in."""
        return {name: value for name, value in body.items() if value is not None} if isinstance(body, dict) else body

    @property
    def sides(self) -> dict[str, int]:
        width, _, height = self.size.partition("x")
        return {"width": int(width), "height": int(height)} if height else {}


def request_within(limits: Limits, presets: Sequence[str]) -> type[ImageRequest]:
    """The request as one server takes it, so that its OpenAPI document says what is allowed."""
    fields = ImageRequest.model_fields
    steps = Field(None, ge=1, le=limits.steps, validation_alias=fields["steps"].validation_alias)
    preset = Field(None, validation_alias=fields["preset"].validation_alias, description=f"default: {presets[0]}")
    changed: dict[str, Any] = {
        "n": (int, Field(1, ge=1, le=limits.images, description=fields["n"].description)),
        "steps": (int | None, steps),
        "preset": (Literal[tuple(presets)] | None, preset),
    }
    return create_model("ImageRequest", __base__=ImageRequest, __doc__=ImageRequest.__doc__, **changed)


class Picture(BaseModel):
    """A PNG, which says itself how it was made, and what the run did."""

    b64_json: str
    revised_prompt: str | None = None
    seed: int
    seconds: float
    prompt_cut: bool = Field(description="the model read only the beginning of the prompt")
    report: dict[str, Any]


class ImagesReply(BaseModel):
    created: int
    data: list[Picture]
    output_format: Literal["png"] = "png"
    size: str


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
