"""Model families as data: how each denoiser of diffusers is built. Adding one is adding an entry."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from diffusers import DiffusionPipeline

from fastdiff.anatomy import JOINT, Anatomy, Family, Stack, recognise
from fastdiff.errors import BadConfig

from .language import language_model
from .parts import companions
from .parts import denoisers as denoisers


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
_WAN = (Stack("blocks"),)
_JOINT = (Stack("transformer_blocks", **JOINT),)
_JOINT_THEN_SINGLE = (*_JOINT, Stack("single_transformer_blocks", **JOINT))
_TEXT_LAST_BLOCKS = (Stack("transformer_blocks", **_TEXT_LAST),)
_TEXT_LAST_TWICE = (*_TEXT_LAST_BLOCKS, Stack("single_transformer_blocks", **_TEXT_LAST))
# Double blocks carry two streams, single blocks one: both streams in one tensor. A region that begins in one stack and
# ends in the other has no residual, so only the longer stack is described; the double blocks before it always run.
_SINGLE_ONLY = (Stack("single_transformer_blocks"),)
_ONE_X = {"takes": ("x",), "returns": ("x",)}
_FILLS = "its blocks fill a store of keys and values that later calls read"


def _transformer(name: str, stacks: tuple[Stack, ...] = (), **facts: Any) -> Family:
    return Family(name, "transformer", stacks, **facts)


def _two(stream: str, other: str, path: str) -> tuple[Stack, ...]:
    """Blocks that take and return two streams, the picture's first."""
    return (Stack(path, (stream, other), (stream, other)),)


UNETS = {
    "UNet2DConditionModel": Family("unet2d", "unet"),
    "UNet2DModel": Family("unet2d_plain", "unet", guidance="none"),
    "UNet3DConditionModel": Family("unet3d", "unet"),
    "I2VGenXLUNet": Family("i2vgenxl", "unet"),
    "UNetSpatioTemporalConditionModel": Family("svd", "unet"),
    "UNetMotionModel": Family("animatediff", "unet"),
    "AudioLDM2UNet2DConditionModel": Family("audioldm2", "unet"),
}
IMAGES = {
    "SD3Transformer2DModel": _transformer("sd3", _JOINT, tokens="text_last"),
    "FluxTransformer2DModel": _transformer("flux", _JOINT_THEN_SINGLE, guidance="calls", tokens="text_first"),
    "Flux2Transformer2DModel": _transformer("flux2", _SINGLE_ONLY, guidance="none", tokens="apart"),
    # Blocks of each stream alone come before; they always run.
    "Flux3Transformer2DModel": _transformer(
        "flux3", (Stack("single_transformer_blocks", **JOINT),), guidance="calls", batches=False
    ),
    "ChromaTransformer2DModel": _transformer("chroma", _SINGLE_ONLY, guidance="calls", tokens="apart"),
    "BriaTransformer2DModel": _transformer("bria", _JOINT_THEN_SINGLE, tokens="text_first"),
    # Each block is given other text in half of its channels, outside the block: only the picture's residual is read.
    "BriaFiboTransformer2DModel": _transformer("bria_fibo", _SINGLE_ONLY),
    # Refiners and what makes tokens of the text come before; they always run.
    "BriaFibo2Transformer2DModel": _transformer(
        "bria_fibo2", (Stack("layers", **_ONE_X),), guidance="calls", batches=False
    ),
    "OvisImageTransformer2DModel": _transformer("ovis", _JOINT_THEN_SINGLE, guidance="calls", tokens="text_first"),
    "LongCatImageTransformer2DModel": _transformer("longcat", _JOINT_THEN_SINGLE, guidance="calls"),
    "QwenImageTransformer2DModel": _transformer("qwenimage", _JOINT, guidance="calls", tokens="text_first"),
    "QwenImage21Transformer2DModel": _transformer("qwenimage21", _BLOCKS, guidance="calls", batches=False),
    "NucleusMoEImageTransformer2DModel": _transformer("nucleusmoe", _BLOCKS, guidance="calls"),
    "AuraFlowTransformer2DModel": _transformer("auraflow", _SINGLE_ONLY, tokens="apart"),
    # Each single block is given other text, appended and cut off outside the block: the residual holds for the picture.
    "HiDreamImageTransformer2DModel": _transformer("hidream", (Stack("single_stream_blocks"),), batches=False),
    "HunyuanImageTransformer2DModel": _transformer("hunyuanimage", _TEXT_LAST_TWICE, guidance="calls"),
    "PixArtTransformer2DModel": _transformer("pixart", _BLOCKS, tokens="apart"),
    "DiTTransformer2DModel": _transformer("dit", _BLOCKS, tokens="apart"),
    "SanaTransformer2DModel": _transformer("sana", _BLOCKS),
    "Transformer2DModel": _transformer("transformer2d", _BLOCKS),
    "UVit2DModel": _transformer("uvit", (Stack("transformer_layers"),), latents="input_ids"),
    "PriorTransformer": _transformer("prior", _BLOCKS, split=(), batches=False),
    "HunyuanDiT2DModel": _transformer("hunyuandit", (Stack("blocks"),), long_skips=True),
    "CogView3PlusTransformer2DModel": _transformer("cogview3plus", _TEXT_LAST_BLOCKS, tokens="text_first"),
    "CogView4Transformer2DModel": _transformer("cogview4", _TEXT_LAST_BLOCKS, guidance="calls", tokens="text_first"),
    "GlmImageTransformer2DModel": _transformer("glmimage", _TEXT_LAST_BLOCKS, guidance="calls", batches=False),
    "LuminaNextDiT2DModel": _transformer("lumina", (Stack("layers"),)),
    # Refiners before `layers` prepare each stream alone; they always run.
    "Lumina2Transformer2DModel": _transformer("lumina2", (Stack("layers"),), guidance="calls", tokens="apart"),
    "ZImageTransformer2DModel": _transformer("zimage", (Stack("layers", **_ONE_X),), tokens="apart"),
    "OmniGenTransformer2DModel": _transformer("omnigen", (Stack("layers"),), batches=False),
    "PRXTransformer2DModel": _transformer("prx", (Stack("blocks"),)),
    # Inside, the tokens come first and the batch second.
    "ErnieImageTransformer2DModel": _transformer("ernie", (Stack("layers", **_ONE_X),), batches=False),
    "Krea2Transformer2DModel": _transformer("krea2", _BLOCKS, guidance="calls", batches=False),
    "Ideogram4Transformer2DModel": _transformer("ideogram4", (Stack("layers"),), guidance="none"),
    "JoyImageEditTransformer3DModel": _transformer(
        "joyimage", (Stack("double_blocks", **_TEXT_LAST),), guidance="calls", batches=False
    ),
    "JoyImageEditPlusTransformer3DModel": _transformer(
        "joyimage_plus", (Stack("double_blocks", **_TEXT_LAST),), batches=False
    ),
}
VIDEOS = {
    "WanTransformer3DModel": _transformer("wan", _WAN, guidance="calls", tokens="apart"),
    # The hints of the control blocks, and those of the face, are added between the blocks: they age with the residual.
    "WanVACETransformer3DModel": _transformer("wan_vace", _WAN, guidance="calls"),
    "WanAnimateTransformer3DModel": _transformer("wan_animate", _WAN, guidance="calls"),
    "WanAnimate2Transformer3DModel": _transformer("wan_animate2", guidance="calls", batches=False, closed=_FILLS),
    "ChronoEditTransformer3DModel": _transformer("chronoedit", _WAN, guidance="calls"),
    "AnyFlowTransformer3DModel": _transformer("anyflow", _WAN, batches=False),
    "AnyFlowFARTransformer3DModel": _transformer("anyflow_far", batches=False, closed=_FILLS),
    "HeliosTransformer3DModel": _transformer("helios", _WAN, guidance="calls", batches=False),
    "SkyReelsV2Transformer3DModel": _transformer("skyreels", _WAN, guidance="calls", tokens="apart"),
    "CogVideoXTransformer3DModel": _transformer("cogvideox", _TEXT_LAST_BLOCKS, tokens="text_first"),
    "ConsisIDTransformer3DModel": _transformer("consisid", _TEXT_LAST_BLOCKS, batches=False),
    "EasyAnimateTransformer3DModel": _transformer("easyanimate", _TEXT_LAST_BLOCKS),
    "HunyuanVideoTransformer3DModel": _transformer(
        "hunyuanvideo", _TEXT_LAST_TWICE, guidance="calls", tokens="text_last"
    ),
    "HunyuanVideoFramepackTransformer3DModel": _transformer(
        "framepack", _TEXT_LAST_TWICE, guidance="calls", batches=False
    ),
    "HunyuanVideo15Transformer3DModel": _transformer("hunyuanvideo15", _TEXT_LAST_BLOCKS, guidance="calls"),
    # The last single blocks begin again with what entered the first block: only the double blocks before are described.
    "MotifVideoTransformer3DModel": _transformer("motifvideo", _TEXT_LAST_BLOCKS, guidance="calls"),
    "CosmosTransformer3DModel": _transformer("cosmos", _BLOCKS, guidance="calls", batches=False),
    "Cosmos3OmniTransformer": _transformer(
        "cosmos3",
        (Stack("layers", ("gen_seq", "und_seq"), ("und_seq", "gen_seq")),),
        guidance="calls",
        batches=False,
        latents="vision_tokens",
    ),
    "Kandinsky5Transformer3DModel": _transformer(
        "kandinsky5",
        (Stack("visual_transformer_blocks", ("visual_embed",), ("visual_embed",)),),
        guidance="calls",
        batches=False,
    ),
    "Kandinsky6Transformer3DModel": _transformer(
        "kandinsky6", _two("vis", "aud", "visual_transformer_blocks"), guidance="calls", batches=False
    ),
    "Kandinsky6SRTransformer3DModel": _transformer(
        "kandinsky6_sr", (Stack("visual_transformer_blocks"),), guidance="none"
    ),
    "LTXVideoTransformer3DModel": _transformer("ltx", _BLOCKS, tokens="apart"),
    "LTX2VideoTransformer3DModel": _transformer(
        "ltx2", _two("hidden_states", "audio_hidden_states", "transformer_blocks"), batches=False
    ),
    "SanaVideoTransformer3DModel": _transformer("sana_video", _BLOCKS),
    "SanaWMTransformer3DModel": _transformer("sana_wm", (Stack("blocks", **_ONE_X),), batches=False),
    "SanaWMLTX2RefinerTransformer3DModel": _transformer(
        "sana_wm_refiner", guidance="none", batches=False, closed=_FILLS
    ),
    "MiniMaxH3Transformer3DModel": _transformer("minimax_h3", _BLOCKS, guidance="none", batches=False),
    "MochiTransformer3DModel": _transformer("mochi", _TEXT_LAST_BLOCKS),
    "AllegroTransformer3DModel": _transformer("allegro", _BLOCKS, tokens="apart"),
    "LatteTransformer3DModel": _transformer("latte", closed="spatial and temporal blocks take turns, in two lists"),
}
OTHERS = {
    "StableAudioDiTModel": _transformer("stableaudio", _BLOCKS, split=()),
    "StableAudio3DiTModel": _transformer("stableaudio3", _BLOCKS, split=()),
    "AceStepTransformer1DModel": _transformer("acestep", (Stack("layers"),), split=()),
    "LongCatAudioDiTTransformer": _transformer("longcat_audio", (Stack("blocks"),), split=(), guidance="calls"),
    "MiniMaxMusic3Transformer1DModel": _transformer("minimax_music3", _BLOCKS, split=(), guidance="calls"),
    "T5FilmDecoder": _transformer(
        "t5film", (Stack("decoders"),), split=(), guidance="none", batches=False, latents="decoder_input_tokens"
    ),
    "RFD4ProteinaTransformer": _transformer(
        "rfd4_proteina",
        split=(),
        guidance="none",
        batches=False,
        latents="bb_ca",
        closed="pairs of tokens, which the layers do not return, are changed between them",
    ),
    "UNet1DModel": _transformer("unet1d", split=(), guidance="none", closed="its blocks have no list of layers"),
    "Kandinsky3UNet": _transformer(
        "kandinsky3", closed="its blocks have no list of layers, and only levels are joined"
    ),
    "StableCascadeUNet": _transformer("stable_cascade", closed="a level holds layers of several kinds and may repeat"),
    "UNetControlNetXSModel": _transformer("controlnet_xs", closed="the layers of a ControlNet are woven into its own"),
}
KNOWN = UNETS | IMAGES | VIDEOS | OTHERS
FAMILIES = Families(KNOWN)


register_family = FAMILIES.register


def anatomies(pipe: DiffusionPipeline) -> list[Anatomy]:
    """An anatomy for each denoiser of the pipeline, the main one first."""
    model = language_model(pipe)
    if model is not None:
        return [model]
    beside = companions(pipe)
    found = [recognise(module, name, FAMILIES) for name, module in denoisers(pipe).items()]
    return [replace(anatomy, companions=beside) for anatomy in found]
