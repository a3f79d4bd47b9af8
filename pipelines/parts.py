"""Which components of a pipeline take part in its denoising loops: denoisers, schedulers, and what helps a denoiser.

Told by structure: a denoiser is a model that is called with a time, whatever the pipeline calls it.
"""

from __future__ import annotations

from typing import Any

from diffusers import ModelMixin
from torch import nn

from fastdiff.anatomy import parameters
from fastdiff.errors import UnsupportedModel

from .wrapped import bare, unwrapped

# Names under which any module is the denoiser, the most important first.
MAIN = ("unet", "transformer", "transformer_2", "prior", "decoder")
_TIMES = {"timestep", "timesteps", "t", "r", "timestep_ratio", "decoder_noise_time", "vision_timesteps", "bb_ca_time"}
_BESIDE = ("controlnet", "adapter", "brushnet")  # in names of what is called with a time, too, to help a denoiser


def denoisers(pipe: Any) -> dict[str, nn.Module]:
    """The components that denoise, by name, the main one first; wrappers around them are looked through.

    Raises UnsupportedModel where there is none, none has its weights loaded, or no scheduler.
    """
    found: dict[str, nn.Module] = {}
    for name, part in _parts(pipe).items():
        if isinstance(part, nn.Module) and (name in MAIN or _denoises(name, part)):
            model = unwrapped(name, part)
            if not any(model is other for other in found.values()):
                found[name] = model
    if found and schedulers(pipe):
        return found
    kind = type(pipe).__name__
    missing = [name for name in MAIN if getattr(pipe, name, pipe) is None]
    if missing and schedulers(pipe):
        raise UnsupportedModel(f"the {missing[0]} of this {kind} is None; load it before you accelerate the pipeline")
    raise UnsupportedModel(
        f"{kind} has no denoiser with a scheduler; fastdiff accelerates pipelines that have a scheduler and one of "
        f"{', '.join(MAIN)}, or another diffusers model that is called with a timestep"
    )


def schedulers(pipe: Any) -> dict[str, Any]:
    """The components that hold the timesteps of a loop, by name; the pipeline's own first."""
    return {name: part for name, part in _parts(pipe).items() if hasattr(part, "set_timesteps")}


def companions(pipe: Any) -> tuple[nn.Module, ...]:
    """Models whose answer a denoiser is given at each step: a ControlNet, or each one of a list of them."""
    found = [part for name, part in _parts(pipe).items() if name.startswith("controlnet")]
    flat = [one for part in found for one in (part if isinstance(part, list | tuple) else [part])]
    return tuple(part for part in flat if isinstance(part, nn.Module))


def _parts(pipe: Any) -> dict[str, Any]:
    """What a pipeline holds by name; `components` of diffusers raises where a part was added by hand."""
    first = (*MAIN, "scheduler")
    named = {name: getattr(pipe, name, None) for name in first}
    held = getattr(pipe, "__dict__", {})
    rest = {name: part for name, part in held.items() if name not in named and not name.startswith("_")}
    return {name: part for name, part in (named | rest).items() if part is not None}


def _denoises(name: str, part: nn.Module) -> bool:
    model = bare(part)
    if not isinstance(model, ModelMixin) or not _TIMES & set(parameters(model)):
        return False
    return not any(word in known.lower() for word in _BESIDE for known in (name, type(model).__name__))
