"""The bodies of requests: those of OpenAI's API, with the extras of diffusion models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, create_model, model_validator

from fastdiff.images import Guidance, Prompt, Seed, Steps

from .protocol import Limits

Lora = Annotated[str, Field(pattern=r"^[^:]{1,200}(:-?[0-9]{1,2}(\.[0-9]{1,4})?)?$")]
MAX_PREVIEWS = 3  # as in OpenAI's API


def _null_is_allowed(schema: dict[str, Any]) -> None:
    """Says in a JSON schema what `_null_is_not_given` does: whatever may be left out may be null."""
    about = ("title", "description", "default")
    for name, field in schema["properties"].items():
        if name not in schema["required"] and "anyOf" not in field:
            kind = {key: field.pop(key) for key in list(field) if key not in about}
            field["anyOf"] = [kind, {"type": "null"}]
    schema["additionalProperties"] = {"type": "null"}


class DrawRequest(BaseModel):
    """What pictures and videos have in common. What is left out, or null, stays with the model; `size` is its own with
    "auto"."""

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, json_schema_extra=_null_is_allowed
    )  # fmt: skip

    prompt: Prompt = Field(min_length=1)
    model: str | None = Field(None, max_length=300, description="the served model's name or an alias, or nothing")
    size: str = Field("auto", pattern=r"^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$", description="auto or WIDTHxHEIGHT")
    user: str | None = Field(None, max_length=1000, description="accepted and not used")
    negative_prompt: Prompt | None = None
    seed: Seed | None = Field(None, description="random if left out; the reply says it")
    steps: Steps | None = Field(None, validation_alias=AliasChoices("steps", "num_inference_steps"))
    guidance_scale: Guidance | None = None
    preset: str | None = Field(None, validation_alias=AliasChoices("preset", "config"))
    lora: list[Lora] = Field(
        [], max_length=8, description="NAME or NAME:SCALE of those that the server was started with"
    )

    @model_validator(mode="before")
    @classmethod
    def _null_is_not_given(cls, body: Any) -> Any:
        """Also in fields of OpenAI's that this server does not have: clients fill them in."""
        return {name: value for name, value in body.items() if value is not None} if isinstance(body, dict) else body

    @property
    def sides(self) -> dict[str, int]:
        width, _, height = self.size.partition("x")
        return {"width": int(width), "height": int(height)} if height else {}


class ImageRequest(DrawRequest):
    """A request for images."""

    n: int = Field(1, ge=1, description="images, with consecutive seeds")
    quality: Literal["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"] = Field(
        "auto", description="low, medium, high: the preset fast, balanced, lossless, or the nearest that is served"
    )
    background: Literal["auto", "opaque", "transparent"] = Field(
        "auto", description="transparent: see-through where the colour is that of the picture's edge"
    )
    output_format: Literal["png", "webp", "jpeg"] = "png"
    output_compression: int | None = Field(None, ge=0, le=100, description="quality of WebP and JPEG; default 95")
    response_format: Literal["b64_json", "url"] = Field("b64_json", description="url: a data URL that holds the image")
    stream: bool = Field(False, description="server-sent events: previews, images")
    partial_images: int = Field(0, ge=0, le=MAX_PREVIEWS, description="previews in a stream, of the first image")
    progress: bool = Field(False, description="in a stream, an event after each step")
    moderation: Literal["auto", "low"] = Field("auto", description="accepted and not used")
    style: Literal["vivid", "natural"] | None = Field(None, description="accepted and not used")
    safety_identifier: str | None = Field(None, max_length=1000, description="accepted and said again")


R = TypeVar("R", bound=DrawRequest)


def within(limits: Limits, presets: Sequence[str], kind: type[R]) -> type[R]:
    """The request as one server takes it, so that its OpenAPI document says what is allowed."""
    fields = kind.model_fields
    steps = Field(None, ge=1, le=limits.steps, validation_alias=fields["steps"].validation_alias)
    preset = Field(None, validation_alias=fields["preset"].validation_alias, description=f"default: {presets[0]}")
    changed: dict[str, Any] = {
        "steps": (int | None, steps),
        "preset": (Literal[tuple(presets)] | None, preset),
    }
    if "n" in fields:
        changed["n"] = (int, Field(1, ge=1, le=limits.images, description=fields["n"].description))
    return create_model(kind.__name__, __base__=kind, __doc__=kind.__doc__, **changed)
