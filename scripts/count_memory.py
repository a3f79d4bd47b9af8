"""What four published models need in memory, as `fastdiff advise` counts it: from their configuration, without weights.

The configuration is written here from the makers' published ones; tokenizers know letters only, since no word is read.

python scripts/count_memory.py --json benchmarks/memory-advice.json
"""

from __future__ import annotations

import json as jsonlib
import string
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import diffusers
import torch
import transformers
import typer
from accelerate import init_empty_weights
from tokenizers.pre_tokenizers import ByteLevel

from fastdiff import output
from fastdiff.bench.row import command
from fastdiff.machine import package_version
from fastdiff.studio.advising import FITS, advise

CARDS = (8, 12, 16, 24, 48, 80)  # GB
Parts = dict[str, Any]


def flow(shift: float) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)


def clip_tokenizer() -> Any:
    letters = [chr(code) for code in range(33, 127)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    vocab = {word: number for number, word in enumerate(words)}
    return transformers.CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)


def t5_tokenizer() -> Any:
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    letters = [(letter, -3.0) for letter in string.ascii_letters + string.digits + string.punctuation]
    return transformers.T5Tokenizer(vocab=special + letters, extra_ids=0, model_max_length=512)


def qwen_tokenizer() -> Any:
    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *ByteLevel.alphabet()]
    return transformers.Qwen2Tokenizer(vocab={word: number for number, word in enumerate(words)}, merges=[])


def clip(hidden: int, layers: int, heads: int, kind: Any = transformers.CLIPTextModel) -> Any:
    return kind(transformers.CLIPTextConfig(
        hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers, num_attention_heads=heads,
        projection_dim=hidden, hidden_act="quick_gelu" if hidden == 768 else "gelu",
    ))  # fmt: skip


T5: Parts = {
    "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "feed_forward_proj": "gated-gelu",
}  # fmt: skip


def image_vae(channels: int, **more: Any) -> Any:
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=channels, sample_size=1024, **more,
    )  # fmt: skip


def sdxl() -> tuple[Any, Parts]:
    unet = diffusers.UNet2DConditionModel(
        sample_size=128, block_out_channels=(320, 640, 1280), layers_per_block=2, cross_attention_dim=2048,
        attention_head_dim=(5, 10, 20), use_linear_projection=True, transformer_layers_per_block=(1, 2, 10),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), addition_embed_type="text_time",
        addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
    )  # fmt: skip
    return diffusers.StableDiffusionXLPipeline, {
        "unet": unet, "vae": image_vae(4), "text_encoder": clip(768, 12, 12),
        "text_encoder_2": clip(1280, 32, 20, transformers.CLIPTextModelWithProjection),
        "tokenizer": clip_tokenizer(), "tokenizer_2": clip_tokenizer(),
        "scheduler": diffusers.EulerDiscreteScheduler(beta_schedule="scaled_linear", steps_offset=1),
    }  # fmt: skip


def flux() -> tuple[Any, Parts]:
    vae = image_vae(16, use_quant_conv=False, use_post_quant_conv=False)
    return diffusers.FluxPipeline, {
        "transformer": diffusers.FluxTransformer2DModel(guidance_embeds=True), "vae": vae,
        "text_encoder": clip(768, 12, 12), "tokenizer": clip_tokenizer(),
        "text_encoder_2": transformers.T5EncoderModel(transformers.T5Config(**T5)), "tokenizer_2": t5_tokenizer(),
        "scheduler": flow(3.0),
    }  # fmt: skip


def wan() -> tuple[Any, Parts]:
    transformer = diffusers.WanTransformer3DModel(cross_attn_norm=True, qk_norm="rms_norm_across_heads")
    umt5 = transformers.UMT5Config(**T5, vocab_size=256384)
    return diffusers.WanPipeline, {
        "transformer": transformer, "vae": diffusers.AutoencoderKLWan(), "tokenizer": t5_tokenizer(),
        "text_encoder": transformers.UMT5EncoderModel(umt5), "scheduler": flow(3.0),
    }  # fmt: skip


def qwen_image() -> tuple[Any, Parts]:
    language = {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    }  # fmt: skip
    seeing = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584}
    reader = transformers.Qwen2_5_VLConfig(text_config=language, vision_config=seeing)
    return diffusers.QwenImagePipeline, {
        "transformer": diffusers.QwenImageTransformer2DModel(), "vae": diffusers.AutoencoderKLQwenImage(),
        "text_encoder": transformers.Qwen2_5_VLForConditionalGeneration(reader), "tokenizer": qwen_tokenizer(),
        "scheduler": flow(3.0),
    }  # fmt: skip


MODELS: dict[str, Callable[[], tuple[Any, Parts]]] = {
    "SDXL": sdxl, "FLUX.1 dev": flux, "Wan 2.1 14B": wan, "Qwen-Image": qwen_image,
}  # fmt: skip


def described(make: Callable[[], tuple[Any, Parts]], folder: Path) -> None:
    """A directory as `save_pretrained` makes it, but for the weights."""
    with init_empty_weights():
        kind, parts = make()
    index: Parts = {"_class_name": kind.__name__, "_diffusers_version": diffusers.__version__}
    for name, part in parts.items():
        library = type(part).__module__.partition(".")[0]
        index[name] = [library, type(part).__name__]
        if library == "transformers" and isinstance(part, torch.nn.Module):
            part.config.save_pretrained(folder / name)
        elif isinstance(part, torch.nn.Module):
            part.save_config(folder / name)
        else:
            part.save_pretrained(folder / name)
    (folder / "model_index.json").write_text(jsonlib.dumps(index), encoding="utf-8")


def row(name: str) -> dict[str, Any]:
    """Bytes of a model in bfloat16, and what makes it fit on each card."""
    with tempfile.TemporaryDirectory() as folder:
        described(MODELS[name], Path(folder))
        told = advise(folder, memory=max(CARDS) * 1e9)
    needs, cards = told.needs, {}
    for card in CARDS:
        fit = next((fit for fit in FITS if needs.total(fit) <= card * 1e9), None)
        cards[str(card)] = {"total": needs.total(fit or FITS[-1]), "flags": None if fit is None else fit.flags}
    return {
        "model": name, "pipeline": told.pipeline, "dtype": told.dtype, "size": told.size, "weights": needs.weights,
        "step": needs.step, "cache": needs.cache, "decode": needs.decode, "cards_gb": cards,
    }  # fmt: skip


def main(
    json: Annotated[Path | None, typer.Option(help="write the result here; it is printed too")] = None,
    only: Annotated[list[str] | None, typer.Option(help="names of models")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite")] = False,
) -> None:
    output.check([json], overwrite)
    packages = {name: package_version(name) for name in ("fastdiff", "torch", "diffusers", "transformers")}
    result = {"rows": [row(name) for name in only or MODELS], "packages": packages, "command": command()}
    text = jsonlib.dumps(result, indent=2)
    if json is not None:
        output.write(json, lambda part: part.write_text(text + "\n", encoding="utf-8"))
    print(text)


if __name__ == "__main__":
    typer.run(main)
