"""Tokenizers and text encoders; a warm start on caption -> scene graph, no image needed, about a minute on one core."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import pre_tokenizers
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from fastdiff.bench.scenes import BACKGROUNDS, COLOURS, RADII, RELATIONS, SHAPES, TEXTURES, Scene

from .data import training_scenes
from .loop import Schedule, train

TOKENS = 24
T5_TOKENS = 256  # what StableDiffusion3Pipeline pads to unless told otherwise
WIDTH = 128
FILLERS = "a an the of on in at to left right above below and background"
WORDS = [*COLOURS, *BACKGROUNDS, *SHAPES, *TEXTURES, *RADII, *FILLERS.split()]


def _merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges until every word is one piece; ties go by spelling, so that every run gives the same ids."""
    pieces = [[*word[:-1], word[-1] + "</w>"] for word in dict.fromkeys(words)]
    merges: list[tuple[str, str]] = []
    while pairs := Counter(pair for word in pieces for pair in pairwise(word)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        pieces = [_merged(word, best) for word in pieces]
    return merges


def _merged(word: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for piece in word:
        if out and (out[-1], piece) == pair:
            out[-1] += piece
        else:
            out.append(piece)
    return out


def clip_tokenizer() -> CLIPTokenizer:
    """Byte-pair encoding in which every word of the world is one token and any other text falls to pieces."""
    alphabet, merges = sorted(pre_tokenizers.ByteLevel.alphabet()), _merges(WORDS)
    ends = [character + "</w>" for character in alphabet]
    pieces = [*alphabet, *ends, *("".join(pair) for pair in merges), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TOKENS)


def t5_tokenizer() -> T5Tokenizer:
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    words = [("▁" + word, -2.0) for word in dict.fromkeys(WORDS)]
    letters = [("▁", -6.0), *((chr(c), -8.0) for c in range(33, 127))]
    return T5Tokenizer(vocab=special + words + letters, extra_ids=0, model_max_length=T5_TOKENS)


def clip_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=3 * WIDTH, num_hidden_layers=3,
        num_attention_heads=4, max_position_embeddings=TOKENS, projection_dim=WIDTH,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = CLIPTextModelWithProjection(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, 0, 0.05)  # CLIP's 0.02 is meant for a width of 512 and more
    return model


class PaddedT5(nn.Module):
    """A T5 encoder that sees `T5_TOKENS` tokens at the cost of `TOKENS`, exactly.

    StableDiffusion3Pipeline pads to 256 and masks nothing. Without position bias (kept at zero) all padding tokens
    are equal in every layer, so one key with log(n) added to its score stands for n of them.
    """

    def __init__(self, tokenizer: T5Tokenizer) -> None:
        super().__init__()
        self.encoder = T5EncoderModel(
            T5Config(
                vocab_size=len(tokenizer), d_model=2 * WIDTH, d_kv=64, d_ff=2 * WIDTH, num_layers=1, num_heads=4,
                feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=1, dropout_rate=0.0,
            )
        )  # fmt: skip
        bias = self.encoder.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
        nn.init.zeros_(bias)
        bias.requires_grad_(False)
        self.register_buffer("key_bias", padding_bias(TOKENS), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        mask = self.key_bias.expand(len(ids), 1, TOKENS, TOKENS)
        return self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state


def padding_bias(length: int) -> Tensor:
    """Score bias of `length` keys whose last one stands for the rest of the `T5_TOKENS` - TOKENS padding tokens."""
    bias = torch.zeros(length)
    bias[-1] = torch.log(torch.tensor(float(T5_TOKENS - TOKENS + 1)))
    return bias


def tokenize(tokenizer: CLIPTokenizer | T5Tokenizer, captions: list[str]) -> Tensor:
    return tokenizer(captions, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt").input_ids


def _graph(scene: Scene) -> list[int]:
    """Class of every slot: (shape, colour, texture) of two objects, relation, background; 0 is absent or unsaid."""
    out = []
    for k in range(2):
        if k < len(scene.things):
            thing = scene.things[k]
            out += [
                SHAPES.index(thing.shape) + 1,
                list(COLOURS).index(thing.colour) + 1,
                TEXTURES.index(thing.texture) + 1,
            ]
        else:
            out += [0, 0, 0]
    relation = list(RELATIONS).index(scene.relation) + 1 if scene.relation else 0
    background = list(BACKGROUNDS).index(scene.named_background) + 1 if scene.named_background else 0
    return [*out, relation, background]


class _Reader(nn.Module):
    """Slot queries that attend to the tokens, as a denoiser's cross-attention will."""

    def __init__(self) -> None:
        super().__init__()
        self.classes = [6, 7, 3, 6, 7, 3, 5, 5]
        self.queries = nn.Parameter(torch.randn(len(self.classes), WIDTH) * 0.1)
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.heads = nn.ModuleList(nn.Linear(2 * WIDTH, c) for c in self.classes)

    def forward(self, tokens: Tensor, pooled: Tensor) -> list[Tensor]:
        seen, _ = self.attention(self.queries.expand(len(tokens), -1, -1), tokens, tokens)
        return [head(torch.cat([seen[:, k], pooled], -1)) for k, head in enumerate(self.heads)]


def run(folder: Path, steps: int = 500) -> tuple[CLIPTokenizer, CLIPTextModelWithProjection]:
    """Warm-started encoder, saved to `folder`/text."""
    tokenizer = clip_tokenizer()
    if (folder / "text" / "config.json").exists():
        return tokenizer, CLIPTextModelWithProjection.from_pretrained(folder / "text")
    torch.manual_seed(0)
    known = training_scenes(20000)
    ids, wanted = tokenize(tokenizer, [s.caption for s in known]), torch.tensor([_graph(s) for s in known])
    model, last, middle = clip_encoder(tokenizer), _Reader(), _Reader()
    modules = {"text": model, "last": last, "middle": middle}

    def read(index: Tensor) -> list[list[Tensor]]:
        out = model(ids[index], output_hidden_states=True)
        return [last(out.last_hidden_state, out.text_embeds), middle(out.hidden_states[-2], out.text_embeds)]

    def loss(_: int) -> Tensor:
        index = torch.randint(len(known) - 1000, (64,))
        return torch.stack([F.cross_entropy(g, wanted[index, k]) for r in read(index) for k, g in enumerate(r)]).mean()

    def gate() -> str:
        index = torch.arange(len(known) - 500, len(known))
        with torch.no_grad():
            right = [(g.argmax(1) == wanted[index, k]).float().mean().item() for k, g in enumerate(read(index)[0])]
        return f"slots {min(right):.3f} at worst"

    groups = [{"params": [p for m in modules.values() for p in m.parameters()], "scale": 1.0}]
    schedule = Schedule(steps, 2e-3, warmup=50, decay=0.8)
    train("text", modules, groups, loss, schedule, folder / "text.pt", average=0.98, gate=gate, gate_every=250)
    model.save_pretrained(folder / "text")
    return tokenizer, model
