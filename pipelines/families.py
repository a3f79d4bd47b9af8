"""Model families as data: how each denoiser of diffusers is built. Adding one is adding an entry."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from diffusers import DiffusionPipeline
from torch import nn

from fastdiff.anatomy import JOINT, Anatomy, Family, Stack, recognise
from fastdiff.errors import BadConfig, UnsupportedModel


class Families(Mapping[str, Family]):
    """Families by the class name of their denoiser; open to other packages through `register_family`."""

    def __init__(self, known: Mapping[str, Family]) -> None:
        self._known = dict(known)

    def __getitem__(self, class_name: str) -> Family:
        return self._known[class_name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)

    def register(self, class_name: str, family: Family) -> None:
        """Describe the denoiser class `class_name`, and its subclasses. Raises BadConfig if it is described already."""
        if class_name in self._known:
            raise BadConfig(f"{class_name} is described already, as {self._known[class_name].name}")
        self._known[class_name] = family


_TEXT_LAST = {
    "takes": ("hidden_states", "encoder_hidden_states"),
    "returns": ("hidden_states", "encoder_hidden_states"),
}

KNOWN = {
    "UNet2DConditionModel": Family("unet2d", "unet"),
    "UNetSpatioTemporalConditionModel": Family("svd", "unet"),
    "UNetMotionModel": Family("animatediff", "unet"),
    "SD3Transformer2DModel": Family("sd3", "transformer", (Stack("transformer_blocks", **JOINT),)),
    "FluxTransformer2DModel": Family(
        "flux",
        "transformer",
        (Stack("transformer_blocks", **JOINT), Stack("single_transformer_blocks", **JOINT)),
        guidance="calls",
    ),
    "PixArtTransformer2DModel": Family("pixart", "transformer", (Stack("transformer_blocks"),)),
    "WanTransformer3DModel": Family("wan", "transformer", (Stack("blocks"),), guidance="calls"),
    "CogVideoXTransformer3DModel": Family("cogvideox", "transformer", (Stack("transformer_blocks", **_TEXT_LAST),)),
}
FAMILIES = Families(KNOWN)


register_family = FAMILIES.register


def denoisers(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    """The components that denoise, by name. Raises UnsupportedModel where there is none."""
    names = ("unet", "transformer", "transformer_2", "prior", "decoder")
    found = {n: m for n in names if isinstance(m := getattr(pipe, n, None), nn.Module)}
    if not found or not hasattr(getattr(pipe, "scheduler", None), "set_timesteps"):
        raise UnsupportedModel(
            f"{type(pipe).__name__} has no denoiser with a scheduler; fastdiff accelerates pipelines that have one of "
            + ", ".join(names)
        )
    return found


def anatomies(pipe: DiffusionPipeline) -> list[Anatomy]:
    """An anatomy for each denoiser of the pipeline."""
    return [recognise(module, name, FAMILIES) for name, module in denoisers(pipe).items()]
