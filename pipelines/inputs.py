"""What a pipeline draws from beside a prompt, and the pipeline of the same model that takes what there is."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from typing import Any

import diffusers

from fastdiff.errors import BadModel, UnsupportedModel

from .parts import MAIN
from .sources import DTYPE, first_line

KINDS = ("image", "mask", "control")
_SHARED = ("cross_attention_dim", "joint_attention_dim", "pooled_projection_dim", "block_out_channels")
_STEERS = ("controlnet", "adapter")  # components that read the picture which `image` is then


def roles(pipe: Any) -> dict[str, str]:
    """The argument of a pipeline's `__call__` for an image, a mask, a control picture and a strength, if it has one."""
    known = inspect.signature(pipe.__call__).parameters
    named = {"image": "image", "control": "control_image", "mask": "mask_image", "strength": "strength"}
    found = {role: name for role, name in named.items() if name in known}
    steered = any(name in _STEERS for name in inspect.signature(type(pipe).__init__).parameters)
    if steered and "image" in found and not {"control", "strength"} & found.keys():
        found["control"] = found.pop("image")
    return found


def needed(pipe: Any) -> list[str]:
    """The pictures without which a pipeline cannot be called."""
    known = inspect.signature(pipe.__call__).parameters
    wanted = [role for role, name in roles(pipe).items() if known[name].default is inspect.Parameter.empty]
    return wanted + (["control"] if getattr(pipe, "controlnet", None) is not None and "control" not in wanted else [])


def fitting(pipe: Any, inputs: Collection[str], controlnet: str | None = None) -> Any:
    """The pipeline itself, or another one with its components, that takes these inputs, `KINDS`.

    controlnet: the directory or hub id of one to add. Raises UnsupportedModel where diffusers has no such pipeline.
    """
    wanted = {*inputs} & {*KINDS}
    model = None if controlnet is None else _controlnet(controlnet, pipe)
    if model is None and wanted <= roles(pipe).keys():
        return pipe
    # named here and no earlier: these come with every pipeline that diffusers has
    auto: Any = diffusers.AutoPipelineForInpainting if "mask" in wanted else diffusers.AutoPipelineForImage2Image
    auto = auto if wanted & {"image", "mask"} else diffusers.AutoPipelineForText2Image
    kind, added = type(pipe).__name__, {} if model is None else {"controlnet": model}
    found = None
    try:
        found = auto.from_pipe(pipe, **added)
    except ValueError:  # how Auto classes say that there is none
        if wanted == {"image"} and model is None:
            found = _moving(pipe)
    if found is None or not wanted <= roles(found).keys():
        names = " and ".join(f"--{name}" for name in KINDS if name in wanted)
        raise UnsupportedModel(f"{kind} takes no {names}, and diffusers has no pipeline that does with its components")
    return found


def _moving(pipe: Any) -> Any:
    """The pipeline that makes a video of a picture with the components of one that makes it of a text."""
    known: Any = diffusers.pipelines.auto_pipeline
    texts = getattr(known, "AUTO_TEXT2VIDEO_PIPELINES_MAPPING", {})
    pictures = getattr(known, "AUTO_IMAGE2VIDEO_PIPELINES_MAPPING", {})
    kind = next((pictures.get(name) for name, known in texts.items() if known is type(pipe)), None)
    return None if kind is None else kind.from_pipe(pipe, **{DTYPE: pipe.dtype})


def _controlnet(model: str, pipe: Any) -> diffusers.ModelMixin:
    try:
        found = diffusers.AutoModel.from_pretrained(model, use_safetensors=True, **{DTYPE: pipe.dtype})
    except Exception as error:
        raise BadModel(f"control model {model!r} cannot be loaded: {first_line(error)}") from error
    _check_shared(model, found, pipe)
    return found


def _check_shared(name: str, control: Any, pipe: Any) -> None:
    """What a ControlNet was made for shows in sizes that it has in common with the denoiser that it steers."""
    denoiser = next((part for name in MAIN if (part := getattr(pipe, name, None)) is not None), None)
    pairs = {size: (control.config.get(size), getattr(denoiser, "config", {}).get(size)) for size in _SHARED}
    if edges := control.config.get("conditioning_embedding_out_channels"):  # each but the first halves the picture
        pairs["scale of pictures to latents"] = (2 ** (len(edges) - 1), getattr(pipe, "vae_scale_factor", None))
    for size, (theirs, ours) in pairs.items():
        if None not in (theirs, ours) and theirs != ours:
            raise BadModel(
                f"control model {name!r} is for another kind of model: its {size} is {_said(theirs)}, that of this "
                f"{type(pipe).__name__} {_said(ours)}; take one that was made for this model"
            )


def _said(size: Any) -> str:
    return " ".join(map(str, size)) if isinstance(size, (list, tuple)) else str(size)
