"""shapes-dit: a flow-matching StableDiffusion3Pipeline with all three of its text encoders."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection

from .denoiser import BATCH, SIDE_WEIGHT, SideTask, Start, caption_gate, weighted_error
from .loop import Schedule, train
from .text import TOKENS, WIDTH, PaddedT5, padding_bias, t5_tokenizer, tokenize

STEPS = 8500
PATCHES = 64


def build(channels: int) -> SD3Transformer2DModel:
    model = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=channels, out_channels=channels, num_layers=6, attention_head_dim=32,
        num_attention_heads=4, caption_projection_dim=128, joint_attention_dim=2 * WIDTH,
        pooled_projection_dim=2 * WIDTH, pos_embed_max_size=8, qk_norm="rms_norm",
    )  # fmt: skip
    # diffusers leaves out DiT's zero start of gates and output layer
    zeroed = [n.linear for b in model.transformer_blocks for n in (b.norm1, b.norm1_context)]
    for layer in (*zeroed, model.norm_out.linear, model.proj_out):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return model


class _BiasedKeys(JointAttnProcessor2_0):
    """The stock processor with a score bias per key, so that one padding token can stand for many (see PaddedT5)."""

    def __init__(self, bias: Tensor) -> None:
        super().__init__()
        self.bias = bias

    def __call__(self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor, *_args, **_kwargs):
        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        image = [heads(f(hidden_states)) for f in (attn.to_q, attn.to_k, attn.to_v)]
        words = [heads(f(encoder_hidden_states)) for f in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)]
        image[0], image[1] = attn.norm_q(image[0]), attn.norm_k(image[1])
        words[0], words[1] = attn.norm_added_q(words[0]), attn.norm_added_k(words[1])
        query, key, value = (torch.cat(pair, 2) for pair in zip(image, words, strict=True))
        mask = self.bias.expand(len(query), 1, query.shape[2], -1)
        out = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        out = out.transpose(1, 2).flatten(2)
        image_out, words_out = out[:, : hidden_states.shape[1]], out[:, hidden_states.shape[1] :]
        if not attn.context_pre_only:
            words_out = attn.to_add_out(words_out)
        return attn.to_out[0](image_out), words_out


def run(start: Start, steps: int = STEPS) -> Path:
    """Train, then save the pipeline in half precision to `folder`/shapes-dit."""
    examples, tokenizer, warm = start.examples, start.tokenizer, start.warm
    torch.manual_seed(2)
    dit = build(examples.latents.shape[1])
    dit.set_attn_processor(_BiasedKeys(padding_bias(PATCHES + 2 * TOKENS)))
    text = CLIPTextModelWithProjection(warm.config)
    text.load_state_dict(warm.state_dict())
    words = t5_tokenizer()
    bag = PaddedT5(words)
    side = SideTask(128, dit.transformer_blocks[2], lambda output: output[1])
    ids, bag_ids = examples.tokens(tokenizer), examples.tokens(words)
    empty, bag_empty = tokenize(tokenizer, [""])[0], tokenize(words, [""])[0]

    def error(clean: Tensor, cells: Tensor, sigma: Tensor, tokens: Tensor, bag_tokens: Tensor, noise: Tensor) -> Tensor:
        s = sigma.view(-1, 1, 1, 1)
        clip = text(tokens, output_hidden_states=True)
        context = torch.cat([clip.hidden_states[-2].repeat(1, 1, 2), bag(bag_tokens)], 1)
        prediction = dit((1 - s) * clean + s * noise, context, clip.text_embeds.repeat(1, 2), sigma * 1000).sample
        return weighted_error(prediction, noise - clean, cells)

    def loss(_: int) -> Tensor:
        index, clean, cells, drop = examples.pick()
        tokens = torch.where(drop[:, None], empty, ids[index])
        bag_tokens = torch.where(drop[:, None], bag_empty, bag_ids[index])
        sigma = torch.sigmoid(torch.randn(BATCH) * 1.1 + 0.2)
        return error(clean, cells, sigma, tokens, bag_tokens, torch.randn_like(clean)) + SIDE_WEIGHT * side(cells)

    @torch.no_grad()
    def gate() -> str:
        clean, cells = examples.latents[:64].float(), examples.cells[:64].long()
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
        sigma = torch.full((64,), 0.8)
        return caption_gate(
            examples.captions[:64],
            lambda c: error(clean, cells, sigma, tokenize(tokenizer, c), tokenize(words, c), noise).item(),
        )

    modules = {"dit": dit, "text": text, "t5": bag, "side": side}
    groups = [
        {"params": [*dit.parameters(), *side.parameters()], "scale": 1.0},
        {"params": [p for p in (*text.parameters(), *bag.parameters()) if p.requires_grad], "scale": 0.2},
    ]
    schedule = Schedule(steps, 1e-3, decay=0.4)
    train("dit", modules, groups, loss, schedule, start.folder / "dit.pt", average=0.9985, gate=gate, gate_every=500)
    dit.set_attn_processor(JointAttnProcessor2_0())
    out = start.folder / "shapes-dit"
    StableDiffusion3Pipeline(
        vae=start.vae.half(),
        transformer=dit.half(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        text_encoder=text.half(),
        tokenizer=tokenizer,
        text_encoder_2=text,
        tokenizer_2=tokenizer,
        text_encoder_3=bag.encoder.half(),
        tokenizer_3=words,
    ).save_pretrained(out)
    return out
