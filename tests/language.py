"""Tiny language models for `LLaDA2Pipeline`, with seeded random weights."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from diffusers import BlockRefinementScheduler, LLaDA2Pipeline
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

MASK, EOS, VOCABULARY = 60, 1, 64


class Layer(nn.Module):
    """Attention with rotary positions, and a feed-forward layer; both residual."""

    def __init__(self, width: int, heads: int, number: int) -> None:
        super().__init__()
        self.heads, self.number = heads, number
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.ff = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, positions: Tensor, allowed: Tensor, cache: Any) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.norms[0](x)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        query, key = rotated(query, positions), rotated(key, positions)
        if cache is not None:
            key, value = cache.update(key, value, self.number)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=allowed)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.ff(self.norms[1](x))


def rotated(x: Tensor, positions: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    rates = 100.0 ** -(torch.arange(half, dtype=x.dtype) / half)
    angles = positions[:, None, :, None] * rates
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], dim=-1)


class BlockLM(nn.Module):
    """Tokens attend to their own block of `block` tokens and to those before it, or, without one, to all."""

    def __init__(self, block: int | None, layers: int = 3, width: int = 32, heads: int = 4, sharp: float = 8.0) -> None:
        super().__init__()
        self.block = block
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.layers = nn.ModuleList(Layer(width, heads, k) for k in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)
        nn.init.normal_(self.head.weight, std=sharp / width**0.5)  # sharp enough that some tokens are confident
        for layer in self.layers:  # context must outweigh what a token is by itself, or nothing is at stake
            nn.init.normal_(layer.qkv.weight, std=3 / width**0.5)
            nn.init.normal_(layer.out.weight, std=3 / width**0.5)
        self.fed: list[int] = []

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.head.weight.dtype

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = False,
    ) -> SimpleNamespace:
        self.fed.append(input_ids.numel())
        cache = (past_key_values or DynamicCache()) if use_cache else None
        past = cache.get_seq_length() if cache is not None else 0
        keys = torch.arange(past + input_ids.shape[1])
        positions = position_ids if position_ids is not None else keys[None, past:]
        allowed = torch.ones(len(input_ids), 1, input_ids.shape[1], len(keys), dtype=torch.bool)
        if self.block is not None:
            allowed &= (keys // self.block)[None, None, None] <= (positions // self.block)[:, None, :, None]
        if attention_mask is not None:
            allowed &= attention_mask[:, None, None].bool() | (keys == positions[..., None])[:, None]
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x, positions, allowed, cache)
        return SimpleNamespace(logits=self.head(self.norm(x)), past_key_values=cache)


class ForgetfulLM(BlockLM):
    """Keeps no keys and values."""

    def forward(self, input_ids: Tensor, attention_mask: Any = None, position_ids: Any = None) -> SimpleNamespace:  # type: ignore[override]
        return super().forward(input_ids, attention_mask, position_ids)


def llama() -> LlamaForCausalLM:
    """A causal model of transformers, which is block-causal for every block."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3, eos_token_id=EOS, bos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def make(model: str = "block-causal", block: int = 8, seed: int = 0) -> LLaDA2Pipeline:
    """A pipeline without a tokenizer, for calls with `input_ids`; the same weights each time."""
    makers = {
        "block-causal": lambda: BlockLM(block),
        "bidirectional": lambda: BlockLM(None),
        "forgetful": lambda: ForgetfulLM(block),
        "llama": llama,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return pipeline(makers[model]())


def pipeline(model: nn.Module) -> LLaDA2Pipeline:
    pipe = LLaDA2Pipeline(model.eval(), BlockRefinementScheduler(block_length=8))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def prompt(length: int = 19, batch: int = 1, seed: int = 0) -> Tensor:
    return torch.randint(2, MASK, (batch, length), generator=torch.Generator().manual_seed(seed))


def write(pipe: LLaDA2Pipeline, ids: Tensor | None = None, **overrides: Any) -> Tensor:
    """The tokens of one call."""
    call = {
        "gen_length": 29, "block_length": 8, "num_inference_steps": 6, "mask_token_id": MASK, "eos_token_id": EOS,
        "output_type": "seq", "max_post_steps": 4,
    }  # fmt: skip
    return pipe(input_ids=prompt() if ids is None else ids, **(call | overrides)).sequences
