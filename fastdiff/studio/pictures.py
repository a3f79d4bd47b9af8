"""Pictures that are drawn from: read, brought to a size that the model draws, handed to its pipeline by their roles."""

from __future__ import annotations

import inspect
import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from fastdiff.errors import BadConfig
from fastdiff.images import Sampling
from fastdiff.pipelines.families import denoisers
from fastdiff.pipelines.inputs import needed, roles
from fastdiff.pipelines.loading import call_defaults
from fastdiff.reading import reading

_FPS = {"Wan": 16, "CogVideoX": 8, "AnimateDiff": 8, "Hunyuan": 15, "Mochi": 30, "TextToVideo": 8, "SkyReels": 24}
_LENGTHS = {"num_frames", "video_length", "frames"}
_RATES = ("frame_rate", "fps")


def kind(known: Collection[str]) -> str:
    """What a pipeline makes, told by the arguments of its call."""
    if _LENGTHS & {*known}:
        return "video"
    return "sound" if any(name.startswith("audio_") for name in known) else "picture"


def multiple(pipe: Any) -> int:
    """Pixels that one patch of the denoiser covers."""
    denoiser = next(iter(denoisers(pipe).values()))
    patch = getattr(denoiser.config, "patch_size", None) or 1
    if hasattr(pipe, "_pack_latents"):
        patch = 2  # Flux packs 2 x 2 latents into one token outside its transformer
    scale = getattr(pipe, "vae_scale_factor", None) or getattr(pipe, "vae_scale_factor_spatial", None) or 8
    pixels = scale * (patch if isinstance(patch, int) else patch[-1])
    return math.lcm(pixels, 8) if hasattr(pipe, "unet") else pixels  # such pipelines insist on 8


def fps(pipe: Any, job: Sampling) -> float:
    """Frames a second: asked for, the pipeline's own, or what its family was trained on."""
    known = inspect.signature(pipe.__call__).parameters
    own = next((known[name].default for name in _RATES if name in known), None)
    usual = next((rate for name, rate in _FPS.items() if type(pipe).__name__.startswith(name)), 24)
    return float(job.fps or (own if isinstance(own, int | float) else usual))


def check(pipe: Any, job: Sampling, makes: str) -> None:
    """Raises BadConfig for pictures that this pipeline does not take, or that are missing, FastdiffError for files."""
    name, known, taken = type(pipe).__name__, inspect.signature(pipe.__call__).parameters, roles(pipe)
    for option in dict.fromkeys(option for option, _ in job.pictures):
        if option not in taken:
            raise BadConfig(f"{name} takes no --{option}; leave it out")
    for option in needed(pipe):
        if option not in dict(job.pictures) and option != "strength":
            raise BadConfig(f"{name} draws from a picture; give it with --{option}")
    if job.mask and not job.image:
        raise BadConfig(f"--mask {job.mask} says where a picture is drawn anew; give the picture with --image")
    if job.strength is not None and "strength" not in taken:
        raise BadConfig(f"{name} takes no strength; it goes with --image, in pipelines that draw over a picture")
    if len(job.image or ()) > 1 and "strength" in taken:
        raise BadConfig(f"{name} draws over one picture; give one --image, this has {len(job.image or ())}")
    if makes != "video" and (job.frames or job.fps):
        raise BadConfig(f"{name} makes no video; leave --frames and --fps out")
    guided(pipe, job)
    if job.frames is not None and "num_frames" not in known:
        raise BadConfig(f"{name} does not take the number of frames; leave --frames out")
    sized = {"width", "height"} & {*known} or "image" in taken
    if (job.width or job.height) and not sized:
        raise BadConfig(f"{name} takes no width and height; leave them out")
    for _, path in job.pictures:
        opened(path)


def guided(pipe: Any, job: Sampling) -> dict[str, Any]:
    """Where guidance by two calls has a scale of its own (Qwen-Image, or Flux with a negative prompt), that is the one
    asked for, unless the model was distilled to be told a scale; with a blank to guide from, as the makers' examples
    have it, where nothing is given. Raises BadConfig for a negative prompt that would not be heeded."""
    known, given = inspect.signature(pipe.__call__).parameters, job.negative_prompt is not None
    if "true_cfg_scale" not in known:
        return {}
    usual = known["true_cfg_scale"].default
    told = any(getattr(denoiser.config, "guidance_embeds", False) for denoiser in denoisers(pipe).values())
    asked = (given or usual > 1) and not told and job.guidance_scale is not None
    scale: Any = job.guidance_scale if asked else usual
    if given and scale <= 1:
        why = ", distilled from guidance," if told else " at a guidance scale of 1 or less"
        raise BadConfig(f"{type(pipe).__name__}{why} heeds no negative prompt; leave it out")
    return {"true_cfg_scale": scale, **({"negative_prompt": " "} if scale > 1 and not given else {})}


def check_strength(pipe: Any, job: Sampling) -> None:
    """Raises BadConfig for a strength that leaves no step; a solver's plan always leaves one."""
    steps = job.steps or call_defaults(pipe).get("num_inference_steps") or 50
    if job.strength is not None and int(steps * job.strength) < 1:
        least = math.ceil(100 / steps) / 100
        raise BadConfig(f"strength {job.strength:g} of {steps} steps draws none of them; give {least:g} or more")


def arguments(pipe: Any, job: Sampling) -> dict[str, Any]:
    """A job's pictures, strength and length as arguments of the pipeline's call."""
    known, taken = inspect.signature(pipe.__call__).parameters, roles(pipe)
    found: dict[str, Any] = {}
    if kind(known) == "video":
        found |= {name: fps(pipe, job) for name in _RATES if name in known and job.fps}
        found |= {"output_type": "pil"} if "output_type" in known else {}
    if job.strength is not None:
        found["strength"] = job.strength
    held = [(option, opened(path, "L" if option == "mask" else "RGB")) for option, path in job.pictures]
    if held and ("strength" in taken or "control" in taken or kind(known) == "video"):
        size = _size(pipe, job, held[0][1])
        held = [(option, picture.resize(size, Image.Resampling.LANCZOS)) for option, picture in held]
        found |= dict(zip(("width", "height"), size, strict=True)) if "height" in known else {}
    for option in dict.fromkeys(option for option, _ in held):
        given = [picture for other, picture in held if other == option]
        found[taken[option]] = given if len(given) > 1 else given[0]
    return found


def for_each(pipe: Any, texts: Sequence[str], image: list[str] | None, strength: float | None) -> dict[str, Any]:
    """The arguments that draw these prompts from pictures: one for each prompt, by turns, where a pipeline draws over
    them; others take all in each call. Raises as `check` does."""
    job = Sampling(prompt=texts[0], image=image or None, strength=strength)
    each, one = "strength" in roles(pipe), job.model_copy(update={"image": job.image and job.image[:1]})
    check(pipe, one if each else job, "picture")
    found = {name: value for name, value in arguments(pipe, job).items() if name != "output_type"}
    held = found.get("image")
    if each and held is not None:
        held = held if isinstance(held, list) else [held]
        found["image"] = [held[k % len(held)] for k in range(len(texts))]
    return found


def _size(pipe: Any, job: Sampling, picture: Image.Image) -> tuple[int, int]:
    """What was asked for; else the picture's own proportions, with no more pixels than the model draws of itself."""
    step = multiple(pipe)
    most = math.prod(usual_sides(pipe) or (math.inf,))
    scale = min(1.0, math.sqrt(most / (picture.width * picture.height)))
    own = [max(step, round(side * scale / step) * step) for side in picture.size]
    return job.width or own[0], job.height or own[1]


def usual_sides(pipe: Any) -> tuple[int, int] | None:
    """Width and height of what a pipeline draws where nobody says any, as far as it says so itself."""
    known = inspect.signature(pipe.__call__).parameters
    sides = [known[name].default for name in ("width", "height") if name in known]
    if len(sides) == 2 and all(isinstance(side, int) for side in sides):
        return sides[0], sides[1]
    denoiser = next(iter(denoisers(pipe).values()))
    latent = getattr(pipe, "default_sample_size", None) or getattr(denoiser.config, "sample_size", None)
    return (latent * getattr(pipe, "vae_scale_factor", 8),) * 2 if isinstance(latent, int) else None


def opened(path: str, mode: str = "RGB") -> Image.Image:
    """A picture upright, in the mode that diffusers wants. Raises FastdiffError for what is none."""
    with reading(Path(path).expanduser()) as picture:
        return ImageOps.exif_transpose(picture).convert(mode)
