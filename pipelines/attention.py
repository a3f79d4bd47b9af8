"""Attention backends, set on instances and only after a real call on the device has worked."""

from __future__ import annotations

import logging

import torch
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _check_attention_backend_requirements,
    _maybe_download_kernel_for_backend,
    dispatch_attention_fn,
)
from diffusers.models.attention_processor import (
    AttnProcessor,
    AttnProcessor2_0,
    JointAttnProcessor2_0,
    XFormersAttnProcessor,
    XFormersJointAttnProcessor,
)
from torch import nn

from fastdiff.errors import BackendUnavailable, UnknownName, UnsupportedModel
from fastdiff.patch import PatchSet

_XFORMERS = {
    AttnProcessor: XFormersAttnProcessor,
    AttnProcessor2_0: XFormersAttnProcessor,
    JointAttnProcessor2_0: XFormersJointAttnProcessor,
}


def backends() -> list[str]:
    """Every name that `[attention] backend` takes."""
    return sorted(name.value for name in AttentionBackendName)


def install_backend(denoiser: nn.Module, backend: str, patches: PatchSet) -> None:
    """Use `backend` for every attention layer of the denoiser.

    Raises UnknownName, BackendUnavailable (with what the probe call said) or UnsupportedModel. Unlike diffusers'
    `set_attention_backend` it leaves the process-wide default alone.
    """
    if backend not in backends():
        raise UnknownName("attention backend", backend, backends())
    layers = [(m, m.processor) for m in denoiser.modules() if getattr(m, "processor", None) is not None]
    dispatched = [processor for _, processor in layers if hasattr(processor, "_attention_backend")]
    if not layers:
        raise UnsupportedModel(f"{type(denoiser).__name__} has no attention layers that a backend could be set on")
    if len(dispatched) < len(layers) and backend == AttentionBackendName.NATIVE:
        return  # such processors call torch's scaled_dot_product_attention themselves
    stuck = {type(p).__name__ for _, p in layers if not hasattr(p, "_attention_backend") and type(p) not in _XFORMERS}
    if len(dispatched) < len(layers) and (backend != AttentionBackendName.XFORMERS or stuck):
        raise UnsupportedModel(
            f"{type(denoiser).__name__} does not go through diffusers' attention dispatcher"
            + (f" ({', '.join(sorted(stuck))})" if stuck else "")
            + "; it takes native or xformers, not " + backend
        )  # fmt: skip
    parameter = next(denoiser.parameters())
    probe(backend, parameter.device, parameter.dtype)
    for layer, processor in layers:
        if hasattr(processor, "_attention_backend"):
            patches.set(processor, "_attention_backend", AttentionBackendName(backend))
        else:
            patches.set(layer, "processor", _XFORMERS[type(processor)]())


def probe(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    """One small attention call. Raises BackendUnavailable if the backend cannot make it here."""
    name = AttentionBackendName(backend)
    query = torch.randn(1, 16, 2, 64, device=device, dtype=dtype)
    quiet = logging.getLogger("diffusers.models.attention_dispatch")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        _check_attention_backend_requirements(name)
        _maybe_download_kernel_for_backend(name)
        with torch.no_grad():
            result = dispatch_attention_fn(query, query, query, backend=name)
        if not torch.isfinite(result).all():
            raise RuntimeError("its result is not finite")
    except Exception as error:  # a third-party kernel may raise anything
        reason = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
        raise BackendUnavailable(
            f"attention backend {backend!r} does not run on {device.type} in {str(dtype).removeprefix('torch.')} here: "
            f"{reason}. Leave [attention] backend out, or use native"
        ) from None
    finally:
        quiet.setLevel(level)
