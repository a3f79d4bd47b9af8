"""The second denoiser of the cache method `switch`: read from its directory, and checked against the first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from fastdiff.anatomy import Anatomy, parameters
from fastdiff.caching.base import CacheMethod
from fastdiff.caching.methods.switch import Switch
from fastdiff.errors import BadConfig, BadModel, UnsupportedModel

from .quantized_parts import is_quantized, load_components
from .sources import DTYPE, check_directory, first_line

_SHAPES = ("in_channels", "out_channels", "sample_size", "cross_attention_dim", "joint_attention_dim")


def with_second(method: CacheMethod, anatomy: Anatomy, shared: bool) -> CacheMethod:
    """A `switch` that holds its second denoiser, on the device and in the type of the first; others as they are.

    shared: whether several ranks draw one picture. Raises BadConfig for a directory that does not exist and for a run
    on several ranks, BadModel for what cannot be read, UnsupportedModel for a denoiser that is called otherwise.
    """
    if not isinstance(method, Switch):
        return method
    if shared:
        raise BadConfig("a parallel method would split the first denoiser of switch alone; leave out one of both")
    own, second = anatomy.denoiser, method.second
    if not isinstance(second, nn.Module):
        second = _read(Path(second).expanduser(), anatomy)
    if second is own:
        raise BadConfig("the second denoiser is the pipeline's own; give another one, or a copy of it")
    if parameters(second) != parameters(own):
        raise UnsupportedModel(f"a {type(second).__name__} is not called as a {type(own).__name__} is")
    for name in _SHAPES:
        one, other = (getattr(getattr(model, "config", None), name, None) for model in (own, second))
        if one != other:
            raise UnsupportedModel(f"the second denoiser has {name} = {other}, the pipeline's own {one}")
    return method.model_copy(update={"second": second})


def _read(folder: Path, anatomy: Anatomy) -> nn.Module:
    own: Any = anatomy.denoiser
    if not folder.is_dir():
        raise BadConfig(f"cache.second: directory {str(folder)!r} does not exist")
    found = next(tensor for tensor in own.parameters() if tensor.is_floating_point())
    if is_quantized(folder):
        module = load_components(folder, found.dtype).get(anatomy.component)
        if module is None:
            raise BadModel(f"{str(folder)!r} holds no quantized {anatomy.component}")
        return module.to(found.device)
    whole: dict[str, str] = {}
    if (folder / "model_index.json").is_file():
        check_directory(folder)
        whole = {"subfolder": anatomy.component}
    saved: Any = {"use_safetensors": True, DTYPE: found.dtype}
    try:
        model: nn.Module = type(own).from_pretrained(str(folder), **whole, **saved)
    except Exception as error:  # diffusers and huggingface_hub each raise their own kinds
        raise BadModel(f"the second denoiser in {str(folder)!r} cannot be loaded: {first_line(error)}") from error
    return model.to(found.device).eval().requires_grad_(False)
