"""What the methods for models that write text by diffusion share."""

from __future__ import annotations

import inspect
from typing import ClassVar

from pydantic import model_validator

from fastdiff.anatomy import Anatomy
from fastdiff.errors import UnsupportedModel

from .base import CacheMethod
from .region import Region

NEEDED = ("input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache")


class TextMethod(CacheMethod):
    """A method for language models: it changes what the model is called with and leaves out none of its layers."""

    language: ClassVar[bool] = True

    @model_validator(mode="after")
    def _no_idle_settings(self) -> TextMethod:
        idle = [n for n, f in CacheMethod.model_fields.items() if n != "method" and getattr(self, n) != f.default]
        if idle:
            raise ValueError(f"{self.method} predicts nothing and has no use for {', '.join(idle)}")
        return self

    def regions(self, anatomy: Anatomy) -> list[Region]:
        """None: a cached step still calls the model, on fewer tokens."""
        takes = inspect.signature(anatomy.denoiser.forward).parameters
        missing = [name for name in NEEDED if name not in takes]
        if missing:
            raise UnsupportedModel(
                f"{self.method} needs a model that keeps keys and values, but {type(anatomy.denoiser).__name__}.forward"
                f" does not take {', '.join(missing)}"
            )
        return []
