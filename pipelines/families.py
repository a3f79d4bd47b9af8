"""Model families as data: how each denoiser of diffusers is built. Adding one is adding an entry."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from diffusers import DiffusionPipeline
from torch import nn

from fastdiff.anatomy import JOINT, Anatomy, Family, Stack, recognise
from fastdiff.errors import BadConfig, UnsupportedModel

from .language import language_model


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
_BLOCKS = (Stack("transformer_blocks"),)
_JOINT = (Stack("transformer_blocks", **JOINT),)
_JOINT_THEN_SINGLE = (*_JOINT, Stack("single_transformer_blocks", **JOINT))
_TEXT_LAST_BLOCKS = (Stack("transformer_blocks", **_TEXT_LAST),)
# Double blocks carry two streams, single blocks one: both streams in one tensor. A region that begins in one stack and
# ends in the other has no residual, so only the longer stack is described; the double blocks before it always run.
_SINGLE_ONLY = (Stack("single_transformer_blocks"),)

KNOWN = {
    "UNet2DConditionModel": Family("unet2d", "unet"),
    "UNetSpatioTemporalConditionModel": Family("svd", "unet"),
    "UNetMotionModel": Family("animatediff", "unet"),
    "AudioLDM2UNet2DConditionModel": Family("audioldm2", "unet"),
    "SD3Transformer2DModel": Family("sd3", "transformer", _JOINT, tokens="text_last"),
    "FluxTransformer2DModel": Family("flux", "transformer", _JOINT_THEN_SINGLE, guidance="calls", tokens="text_first"),
    "Flux2Transformer2DModel": Family("flux2", "transformer", _SINGLE_ONLY, guidance="none", tokens="apart"),
    "ChromaTransformer2DModel": Family("chroma", "transformer", _SINGLE_ONLY, guidance="calls", tokens="apart"),
    "BriaTransformer2DModel": Family("bria", "transformer", _JOINT_THEN_SINGLE, tokens="text_first"),
    "OvisImageTransformer2DModel": Family(
        "ovis", "transformer", _JOINT_THEN_SINGLE, guidance="calls", tokens="text_first"
    ),
    "QwenImageTransformer2DModel": Family("qwenimage", "transformer", _JOINT, guidance="calls", tokens="text_first"),
    "AuraFlowTransformer2DModel": Family("auraflow", "transformer", _SINGLE_ONLY, tokens="apart"),
    # Each single block is given other text, appended and cut off outside the block: the residual holds for the picture.
    "HiDreamImageTransformer2DModel": Family("hidream", "transformer", (Stack("single_stream_blocks"),), batches=False),
    "PixArtTransformer2DModel": Family("pixart", "transformer", _BLOCKS, tokens="apart"),
    "DiTTransformer2DModel": Family("dit", "transformer", _BLOCKS, tokens="apart"),
    "SanaTransformer2DModel": Family("sana", "transformer", _BLOCKS),
    "PriorTransformer": Family("prior", "transformer", _BLOCKS, split=(), batches=False),
    "HunyuanDiT2DModel": Family("hunyuandit", "transformer", (Stack("blocks"),), long_skips=True),
    "CogView3PlusTransformer2DModel": Family("cogview3plus", "transformer", _TEXT_LAST_BLOCKS, tokens="text_first"),
    "CogView4Transformer2DModel": Family(
        "cogview4", "transformer", _TEXT_LAST_BLOCKS, guidance="calls", tokens="text_first"
    ),
    # Refiners before `layers` prepare each stream alone; they always run.
    "Lumina2Transformer2DModel": Family("lumina2", "transformer", (Stack("layers"),), guidance="calls", tokens="apart"),
    "ZImageTransformer2DModel": Family(
        "zimage", "transformer", (Stack("layers", takes=("x",), returns=("x",)),), tokens="apart"
    ),
    "WanTransformer3DModel": Family("wan", "transformer", (Stack("blocks"),), guidance="calls", tokens="apart"),
    "SkyReelsV2Transformer3DModel": Family(
        "skyreels", "transformer", (Stack("blocks"),), guidance="calls", tokens="apart"
    ),
    "CogVideoXTransformer3DModel": Family("cogvideox", "transformer", _TEXT_LAST_BLOCKS, tokens="text_first"),
    "HunyuanVideoTransformer3DModel": Family(
        "hunyuanvideo",
        "transformer",
        (*_TEXT_LAST_BLOCKS, Stack("single_transformer_blocks", **_TEXT_LAST)),
        guidance="calls",
    ),
    "LTXVideoTransformer3DModel": Family("ltx", "transformer", _BLOCKS, tokens="apart"),
    "MochiTransformer3DModel": Family("mochi", "transformer", _TEXT_LAST_BLOCKS),
    "AllegroTransformer3DModel": Family("allegro", "transformer", _BLOCKS, tokens="apart"),
    # Blocks of two lists take turns, which no Stack says: no method that needs a stack works here.
    "LatteTransformer3DModel": Family("latte", "transformer"),
    "StableAudioDiTModel": Family("stableaudio", "transformer", _BLOCKS, split=()),
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
    model = language_model(pipe)
    if model is not None:
        return [model]
    control = getattr(pipe, "controlnet", None)
    companions = (control,) if isinstance(control, nn.Module) else ()
    found = [recognise(module, name, FAMILIES) for name, module in denoisers(pipe).items()]
    return [replace(anatomy, companions=companions) for anatomy in found]
