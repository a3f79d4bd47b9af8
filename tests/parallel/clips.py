"""Videos and sound on real ranks: masked text, frames that are given, two transformers; run by real processes, see
ranks.py. Latents are compared in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fastdiff
from fastdiff.errors import FastdiffError
from tests.caching.test_two_denoisers import two
from tests.zoo import ZOO
from tests.zoo_entry import noise
from tests.zoo_loop import Denoiser, ones, text

from .checks import EXACT, digest, moved

SPLIT = ("wan", "cogvideox", "hunyuan video", "ltx")
WHOLE = ("svd", "audioldm2")
SOME = ones()
SOME[:, 4:] = 0
MASKED = {"prompt_attention_mask": SOME, "negative_prompt_attention_mask": SOME}
METHODS: dict[str, Any] = {
    "patch": "patch", "ring": "ring", "token_ring": "token_ring", "ulysses": "ulysses", "cfg": "cfg",
    "pipefusion": {"method": "pipefusion", "patches": 1},
}  # fmt: skip
_HUNYUAN = {
    "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 10, "num_layers": 2,
    "num_single_layers": 2, "num_refiner_layers": 1, "patch_size": 1, "text_embed_dim": 32, "guidance_embeds": False,
    "pooled_projection_dim": 32, "rope_axes_dim": (2, 4, 4), "image_condition_type": "token_replace",
}  # fmt: skip
_LTX = {
    "in_channels": 8, "out_channels": 8, "num_attention_heads": 4, "attention_head_dim": 8, "cross_attention_dim": 32,
    "num_layers": 2, "caption_channels": 32,
}  # fmt: skip


def wide(given: dict[str, Any]) -> dict[str, Any]:
    return {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in given.items()}


def clip(name: str, **changes: Any) -> tuple[Any, Callable[..., Tensor]]:
    """A pipeline, and what draws with it in so many steps."""
    pipe: Any = (two(0.8) if name == "wan 2.2" else ZOO[name].make()).to(torch.float64)
    entry = ZOO["wan" if name == "wan 2.2" else name]
    return pipe, lambda steps=4: entry.run(pipe, steps, **wide(entry.arguments() | changes))


def given(name: str, config: dict[str, Any], shape: tuple[int, ...], call: Callable[..., Any]) -> Any:
    """A denoiser in a loop of its own, as `clip`."""
    denoiser = Denoiser(name, config, shape, lambda x, t: wide(call(x, t)))
    pipe = denoiser.make().to(torch.float64)
    return pipe, lambda steps=4: denoiser.draw(pipe, steps)


def first_frame_of_hunyuan(x: Tensor, t: Tensor) -> dict[str, Any]:
    return {
        "hidden_states": x, "timestep": t, "encoder_hidden_states": text(32), "encoder_attention_mask": SOME,
        "pooled_projections": noise(1, 32),
    }  # fmt: skip


def first_frame_of_ltx(x: Tensor, t: Tensor) -> dict[str, Any]:
    """16 tokens, of which 4 are of a frame that is given."""
    times = t[:, None].repeat(1, x.shape[1])
    times[:, :4] = 0
    return {
        "hidden_states": x, "timestep": times, "encoder_hidden_states": text(32), "encoder_attention_mask": SOME,
        "num_frames": 4, "height": 2, "width": 2,
    }  # fmt: skip


def same(made: tuple[Any, Callable[..., Tensor]], method: Any) -> dict[str, str]:
    """Alone, then split, then alone again."""
    pipe, draw = made
    alone = draw()
    with fastdiff.accelerate(pipe, parallel=method):
        found = draw()
    assert moved(found, alone) < EXACT, (type(pipe).__name__, method, moved(found, alone))
    assert torch.equal(draw(), alone)
    return {"digest": digest(found)}


def masked_text(rank: int, ranks: int) -> dict:
    """HunyuanVideo says which of the text's tokens are seen: others of each picture."""
    found = {}
    masks = torch.stack([ones()[0], SOME[0]])
    several = {"prompt_embeds": noise(2, 7, 32), "pooled_prompt_embeds": noise(2, 32), "prompt_attention_mask": masks}
    several |= {f"negative_{name}": value for name, value in several.items()}
    for name in ("patch", "ring", "token_ring", *(("ulysses", "pipefusion") if ranks == 2 else ())):
        found[name] = same(clip("hunyuan video", **several), METHODS[name])
    seen, some = (clip("hunyuan video", **changes)[1]() for changes in ({}, MASKED))
    assert moved(some, seen) > 1e-3, "the mask counts"
    return found


def frames_that_are_given(rank: int, ranks: int) -> dict:
    hunyuan = ("HunyuanVideoTransformer3DModel", _HUNYUAN, (1, 4, 3, 4, 4), first_frame_of_hunyuan)
    ltx = ("LTXVideoTransformer3DModel", _LTX, (1, 16, 8), first_frame_of_ltx)
    return {f"{one[0]} {method}": same(given(*one), method) for one in (hunyuan, ltx) for method in ("patch", "ring")}


def every_method(rank: int, ranks: int) -> dict:
    return {
        f"{name} {label}": same(clip(name, **(MASKED if name in ("hunyuan video", "ltx") else {})), method)
        for name in SPLIT
        for label, method in METHODS.items()
    }


def halves(rank: int, ranks: int) -> dict:
    return {name: same(clip(name), "cfg") for name in WHOLE}


def two_transformers(rank: int, ranks: int) -> dict:
    """Wan 2.2: each has a part of the run, and of each step old values are its own."""
    found = {label: same(clip("wan 2.2"), method) for label, method in METHODS.items()}
    pipe, draw = clip("wan 2.2")
    alone = draw(12)
    for method in ("distrifusion", "parastep", {"method": "pipefusion", "patches": 2}):
        with fastdiff.accelerate(pipe, parallel=method):
            result = draw(12)
        assert 0 < moved(result, alone) < 0.1, (method, moved(result, alone))
        found[str(method)] = {"digest": digest(result)}
    return found


def errors(rank: int, ranks: int) -> dict[str, float]:
    """How far methods that use what is old are from one device, by number of steps."""
    found = {}
    for name in (*SPLIT, *WHOLE, "wan 2.2"):
        for steps in (8, 16, 32):
            pipe, draw = clip(name)
            alone = draw(steps)
            for method in ("parastep", *_stale(name)):
                with fastdiff.accelerate(pipe, parallel={"method": method, "warmup_steps": steps // 4}):
                    found[f"{name} {method} {steps}"] = moved(draw(steps), alone)
    return found


def _stale(name: str) -> tuple[str, ...]:
    if name not in SPLIT:
        return ()
    return ("distrifusion",) if name == "hunyuan video" else ("distrifusion", "pipefusion")


def refused(rank: int, ranks: int) -> dict[str, str]:
    said = {}
    cases = [(name, method) for name in WHOLE for method in ("distrifusion", "ring", "pipefusion")]
    for name, method in (*cases, ("hunyuan video", "pcpp"), ("hunyuan video", "pipefusion")):
        pipe, draw = clip(name)
        try:
            with fastdiff.accelerate(pipe, parallel=method):
                draw(6)
            said[f"{name} {method}"] = "went through"
        except FastdiffError as error:
            fastdiff.restore(pipe)
            said[f"{name} {method}"] = str(error)
    return said
