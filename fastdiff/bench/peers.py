"""Which rivals there are for a pipeline."""

from __future__ import annotations

from typing import Any

from .peer import Peer
from .peers_dit import dit_peers
from .peers_unet import unet_peers


def peers_for(pipe: Any, steps: int, guidance_scale: float | None = None) -> list[Peer]:
    """All rivals that are made for this kind of denoiser, installed or not; `steps` scales what is given in steps."""
    return unet_peers(steps) if hasattr(pipe, "unet") else dit_peers(steps, guidance_scale)
