"""Sparse attention in a live denoiser: which of its attention calls are long, unmasked self-attention, and what of them
is computed. The others stay dense, and the report says how many and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.anatomy import Anatomy, named, parameters
from fastdiff.clock import Run, Step, StepClock
from fastdiff.config import Config
from fastdiff.errors import BackendUnavailable, BadConfig, UnsupportedModel
from fastdiff.parallel.attention import Intercept, is_attention
from fastdiff.patch import PatchSet
from fastdiff.recorder import Recorder

from .blocks import attend, attend_blocks
from .radial import radial
from .sparge import sparge

Forward = Callable[..., Any]


def install_sparse(anatomy: Anatomy, config: Config, clock: StepClock, recorder: Recorder, patches: PatchSet) -> None:
    """Make the long self-attention of a denoiser's blocks sparse, if `config.attention` says so.

    Raises BadConfig where ranks share the tokens of a picture or graphs would hold a choice of blocks,
    UnsupportedModel where nobody told which tokens are the text's, BackendUnavailable where a CUDA device cannot
    compile flex attention or it disagrees with the reference.
    """
    how, family = config.attention, anatomy.family
    if how.sparse is None:
        return
    if config.parallel is not None and config.parallel.method != "cfg":
        raise BadConfig(
            f"sparse attention chooses among all tokens and steps of a picture, and {config.parallel.method} gives "
            "each rank a part of them; leave out attention.sparse, or take parallel.method = cfg"
        )
    if config.compile.enabled:
        raise BadConfig("compiled graphs cannot hold a choice of blocks that changes; leave out compile, or sparse")
    if how.sparse == "radial" and family.kind != "transformer":
        raise UnsupportedModel("radial goes by the frames of a video transformer's tokens; take sparge")
    if family.kind == "language" or (family.kind == "transformer" and not _told(anatomy)):
        raise UnsupportedModel(
            f"which tokens of a {family.name} are the text's is not described, and sparse attention keeps them all; "
            "leave out attention.sparse (Family.tokens describes it where the text has a stream of its own)"
        )
    parameter = next(anatomy.denoiser.parameters())
    if parameter.is_cuda:
        probe(how.block, parameter.device, parameter.dtype)
    Sparse(anatomy, config, clock, recorder).attach(patches)


def _told(anatomy: Anatomy) -> bool:
    """Whether the family says where the text is, and not just that it is in one stream with the picture."""
    blocks, tokens = anatomy.blocks, anatomy.family.tokens
    return bool(blocks) and (
        tokens in ("text_first", "text_last")
        or (tokens == "apart" and all("encoder_hidden_states" in parameters(block) for block in blocks))
    )


def probe(block: int, device: torch.device, dtype: torch.dtype) -> None:
    """One small call. Raises BackendUnavailable if flex attention cannot make it here, or makes it wrong."""
    if block % 128:
        raise BackendUnavailable(f"attention.block = {block}: flex attention takes multiples of 128 on CUDA")
    query = torch.randn(1, 1, 3 * block - 8, 64, device=device, dtype=dtype)
    kept = torch.eye(3, dtype=torch.bool, device=device)[None, None]
    try:
        apart = (attend(query, query, query, kept, block) - attend_blocks(query, query, query, kept, block)).abs().max()
        wrong = "" if apart < 0.05 else f"it is {apart:.1e} off the reference"
    except Exception as error:  # compilers raise anything
        wrong = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if wrong:
        raise BackendUnavailable(f"sparse attention needs compiled flex attention, which fails here: {wrong}")


class Sparse:
    """What the attention of one denoiser leaves out, call by call."""

    def __init__(self, anatomy: Anatomy, config: Config, clock: StepClock, recorder: Recorder) -> None:
        self._anatomy, self._how, self._clock, self._recorder = anatomy, config.attention, clock, recorder
        self._streams = (0, 0)  # tokens of the picture and of the text in the present block; the text's are 0 if apart
        self._start()
        clock.on_start.append(self._start)
        clock.on_end.append(self._end)

    def _start(self, run: Run | None = None) -> None:
        if run is not None and self._how.sparse == "radial" and len(run.shape) == 3:
            raise UnsupportedModel("radial goes by the frames of a video; take sparge for a picture's latents")
        self._kept: dict[Any, tuple[int, Tensor, Tensor]] = {}  # step of the choice, the choice, its density
        self._dense: Counter[str] = Counter()
        self._sparse, self._density = 0, torch.zeros(())

    def attach(self, patches: PatchSet) -> None:
        blocks = self._anatomy.blocks
        if not blocks:
            found = [module for module in self._anatomy.denoiser.modules() if is_attention(module)]
            for layer, module in enumerate(found):
                patches.wrap_forward(module, partial(self._attention, module, layer))
        for layer, block in enumerate(blocks):
            for module in filter(is_attention, block.modules()):
                patches.wrap_forward(module, partial(self._attention, module, layer))
            if self._anatomy.family.tokens != "apart":
                patches.wrap_forward(block, partial(self._block, block))

    def _block(self, block: nn.Module, forward: Forward) -> Forward:
        stack, by_name = self._anatomy.stack_of(block), named(block)

        @wraps(forward)
        def block_forward(*args: Any, **kwargs: Any) -> Any:
            given = by_name(args, kwargs)
            text = given.get(stack.takes[1])
            self._streams = (given[stack.takes[0]].shape[1], 0 if text is None else text.shape[1])
            return forward(*args, **kwargs)

        return block_forward

    def _attention(self, module: nn.Module, layer: int, forward: Forward) -> Forward:
        by_name, apart = named(module), self._anatomy.family.tokens in ("apart", None)

        @wraps(forward)
        def attention_forward(*args: Any, **kwargs: Any) -> Any:
            step = self._clock.now
            if step is None or (apart and by_name(args, kwargs).get("encoder_hidden_states") is not None):
                return forward(*args, **kwargs)
            with Intercept(partial(self._attend, module, layer, step)):
                return forward(*args, **kwargs)

        return attention_forward

    def _attend(
        self, module: nn.Module, layer: int, step: Step, query: Tensor, key: Tensor, value: Tensor,
        attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False, **more: Any,
    ) -> Tensor:  # fmt: skip
        """In the place of scaled_dot_product_attention."""
        tokens = query.shape[-2]
        frames = self._frames(step.run.shape, tokens) if self._how.sparse == "radial" else 1
        why = self._why_dense(layer, step, tokens, frames)
        if attn_mask is not None or is_causal or dropout_p:
            why = "masked by the model"
        elif query.ndim != 4 or key.shape[:-1] != query.shape[:-1] or tokens not in self._lengths(tokens):
            why = "of other keys than queries"
        if why:
            self._dense[why] += 1
            return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **more)
        scale = more.get("scale")
        kept, density = self._choice((id(module), step.branch), step, query, key, frames, scale)
        self._sparse += 1
        self._density = self._density.to(density.device) + density
        return attend(query, key, value, kept, self._how.block, scale)

    def _lengths(self, tokens: int) -> tuple[int, ...]:
        """Numbers of tokens that are known to be the picture's with or without the text's."""
        picture, text = self._streams
        return (picture, picture + text) if picture else (tokens,)

    def _why_dense(self, layer: int, step: Step, tokens: int, frames: int) -> str:
        how = self._how
        if tokens < how.min_tokens:
            return f"of fewer than {how.min_tokens} tokens"
        if step.index < how.warmup_steps or step.index >= step.run.total - how.cooldown_steps:
            return "in dense steps"
        if layer < how.dense_layers:
            return "in dense layers"
        return "" if frames else "of tokens whose frames are not known"

    def _frames(self, shape: tuple[int, ...], tokens: int) -> int:
        """Frames of a video's tokens, whose denoiser is given latents of this shape; 0 where nothing tells."""
        config: Any = getattr(self._anatomy.denoiser, "config", None)
        if len(shape) != 4 or config is None:
            return 0
        patch = getattr(config, "patch_size", 1)
        each = patch[0] if isinstance(patch, list | tuple) else getattr(config, "patch_size_t", None) or 1
        frames = int(shape[1] if shape[0] == getattr(config, "in_channels", None) else shape[0]) // each
        picture = self._streams[0] or tokens
        return frames if frames > 1 and picture % frames == 0 else 0

    def _choice(
        self, place: Any, step: Step, query: Tensor, key: Tensor, frames: int, scale: float | None
    ) -> tuple[Tensor, Tensor]:
        """The blocks that are kept, and their share: chosen anew where `interval` steps have passed."""
        how, tokens = self._how, query.shape[-2]
        text = tokens - (self._streams[0] or tokens)
        picture = (text, tokens) if self._anatomy.family.tokens == "text_first" else (0, tokens - text)
        place = (*place, *query.shape[:-1]) if how.sparse == "sparge" else (tokens, text)
        made, kept, density = self._kept.get(place, (step.index, None, query))
        if kept is None or (how.sparse == "sparge" and not 0 <= step.index - made < how.interval):
            if how.sparse == "sparge":
                kept = sparge(query, key, picture, how, scale)
            else:
                kept = radial(tokens, picture, frames, how.block, how.decay, query.device)
            density = kept.float().mean()
            self._kept[place] = (step.index, kept, density)
        return kept, density

    def _end(self, run: Run) -> None:
        dense = self._dense.total()
        if self._sparse or dense:
            told = {"sparse": self._sparse, "dense": dense, "why_dense": dict(self._dense)}
            told["density"] = float(self._density) / max(self._sparse, 1)
            self._recorder.report.attention[self._anatomy.component] = told
        reasons = ", ".join(f"{count} {why}" for why, count in self._dense.items()) or "none arrived"
        if not self._sparse:
            self._recorder.note(f"attention.sparse did nothing: attention calls that stayed dense: {reasons}")
        self._start()
