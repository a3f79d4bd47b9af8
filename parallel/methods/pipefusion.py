"""PipeFusion: Patch-level Pipeline Parallelism for Diffusion Transformers Inference. https://arxiv.org/abs/2405.14430."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from fastdiff.errors import BadConfig
from fastdiff.parallel.base import ParallelMethod
from fastdiff.parallel.stages import attend, leave, split_stages


class PipeFusion(ParallelMethod):
    """Blocks lie on different ranks and patches flow through them; keys and values of patches to come are a step old.

    Each rank has the weights of its blocks alone, and sends one patch at a time to the next one. Warm-up steps are one
    patch, and exact. The text of joint attention travels with the first patch. Unlike the authors' code, patches of the
    next step do not start before this step's solver: more `patches` than ranks keep the ranks busy.

    Formula: h_m = f_l(h_m; k, v of patches 1 .. m at this step i, of the others at i - 1) for the blocks l of a rank.
    """

    method: Literal["pipefusion"] = "pipefusion"
    warmup_steps: int = Field(1, ge=1, description="steps at the start that are one patch, and exact")
    patches: int | None = Field(None, ge=1, description="patches of a picture; None takes two for each rank")

    attend: ClassVar[Any] = staticmethod(attend)
    split: ClassVar[Any] = staticmethod(split_stages)
    leave: ClassVar[Any] = staticmethod(leave)

    @model_validator(mode="after")
    def _has_stages(self) -> PipeFusion:
        if self.shard or self.on_peer_loss == "local":
            raise BadConfig(
                "pipefusion leaves each rank the blocks of its stage: set parallel.shard to none and "
                "parallel.on_peer_loss to raise"
            )
        return self

    def fresh(self, index: int, total: int | None = None) -> bool:
        return index < self.warmup_steps

    def patches_of(self, ranks: int) -> int:
        return self.patches or 2 * ranks

    def stretch(self, ranks: int, fresh: bool) -> float:
        count = 1 if fresh else self.patches_of(ranks)
        return (count + ranks - 1) / count
