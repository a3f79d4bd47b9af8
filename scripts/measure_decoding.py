"""What parallel decoding of text trades (threshold, verifier, delayed caching); writes benchmarks/decoding.json.

    python scripts/measure_decoding.py [--steps 2500] [--prompts 16]

On a small block-diffusion model (and a smaller causal verifier) that the script trains first, in minutes, on the
captions of the embedded models: their grammar tells whether a sentence that was written is one. No pretrained model is
at hand here; how often a large one agrees with itself is another matter, what the settings trade is not.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import fastdiff
from fastdiff.bench.row import command, environment
from fastdiff.bench.scenes import scenes
from tests.language import EOS, MASK, BlockLM, pipeline

OUTPUT = Path(__file__).parents[1] / "benchmarks" / "decoding.json"
BLOCK, WRITTEN, ASKED = 8, 64, 16
THING = r"a (small |large )?(striped )?\w+ (circle|square|triangle|cross|ring)"
SENTENCE = re.compile(rf"{THING}( (above|below|to the (left|right) of) {THING})?( on a \w+ background)?")
CALL: dict[str, Any] = {
    "gen_length": WRITTEN, "block_length": BLOCK, "num_inference_steps": BLOCK, "mask_token_id": MASK,
    "editing_threshold": None, "eos_early_stop": False, "temperature": 1.0, "output_type": "seq",
}  # fmt: skip
THRESHOLDS = (2.0, 0.95, 0.9, 0.7, 0.5, 0.3, 0.0)
RATIOS = (0.0, 0.3, 0.5, 0.7, 0.9, 1.0)
INTERVALS = (1, 2, 4, 8)


def main(
    steps: Annotated[int, typer.Option(min=1, help="of training")] = 2500,
    prompts: Annotated[int, typer.Option(min=1)] = 16,
) -> None:
    """Train, measure, print and write all rows."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    captions = [scene.caption.split() for scene in scenes(0, 4000, held_out=False)]
    words = sorted({word for caption in captions for word in caption})
    numbers = {word: number for number, word in enumerate(words, 2)}
    texts = [[numbers[word] for word in caption] + [EOS] for caption in captions]
    writer, verifier = _fresh(BlockLM(BLOCK, width=64)), _fresh(BlockLM(1, layers=2))
    losses = {"writer": _train(writer, texts, steps, _denoising), "verifier": _train(verifier, texts, steps, _next)}
    held = [[numbers[word] for word in scene.caption.split()] + [EOS] for scene in scenes(1, 200, held_out=True)]
    asked = _streams(held, prompts, ASKED, torch.Generator().manual_seed(1))
    rows = []
    for name, cache, threshold in _settings(verifier):
        pipe = pipeline(writer)
        handle = fastdiff.accelerate(pipe, **({} if cache is None else {"cache": cache}))
        rows.append({"name": name, "threshold": threshold, **_measured(pipe, handle, asked, threshold, words)})
        handle.restore()
        print(json.dumps(rows[-1]), flush=True)
    written = {
        "command": command(), "training_steps": steps, "last_losses": losses, "prompts": prompts, "prompt": ASKED,
        "call": {key: value for key, value in CALL.items() if key not in ("mask_token_id", "output_type")},
        "environment": environment(pipeline(writer)), "rows": rows,
    }  # fmt: skip
    OUTPUT.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")


def _settings(verifier: nn.Module) -> Iterator[tuple[str, dict[str, Any] | None, float]]:
    for threshold in THRESHOLDS:
        yield "threshold", None, threshold
    for ratio in RATIOS:
        yield f"apd, ratio {ratio:g}", {"method": "apd", "verifier": verifier, "ratio": ratio, "prefix": False}, 0.9
    yield "fast_dllm", {"method": "fast_dllm"}, 0.9
    for interval in INTERVALS:
        yield f"dkv_cache, interval {interval}", {"method": "dkv_cache", "interval": interval}, 0.9


def _fresh(model: BlockLM) -> BlockLM:
    """With weights to train from; those of the tests are made to be sharp."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.reset_parameters()
    return model


def _streams(texts: list[list[int]], count: int, length: int, generator: torch.Generator) -> Tensor:
    """(count, length) tokens: sentences one after another, from the beginning of one."""
    rows = []
    for _ in range(count):
        row: list[int] = []
        while len(row) < length:
            row += texts[int(torch.randint(len(texts), (), generator=generator))]
        rows.append(row[:length])
    return torch.tensor(rows)


def _train(model: BlockLM, texts: list[list[int]], steps: int, loss_of: Any) -> float:
    generator = torch.Generator().manual_seed(0)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, steps)
    losses = []
    for _ in range(steps):
        loss = loss_of(model, _streams(texts, 32, ASKED + WRITTEN, generator), generator)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        rate.step()
        model.fed.clear()
        losses.append(loss.item())
    model.eval().requires_grad_(False)
    return round(statistics.mean(losses[-100:]), 4)


def _denoising(model: BlockLM, tokens: Tensor, generator: torch.Generator) -> Tensor:
    """The open block masked in part, what is before it clean: what the pipeline asks."""
    end = BLOCK * int(torch.randint(1, tokens.shape[1] // BLOCK + 1, (), generator=generator))
    tokens = tokens[:, :end]
    masked = torch.rand(len(tokens), BLOCK, generator=generator) < torch.rand(len(tokens), 1, generator=generator)
    masked[:, int(torch.randint(BLOCK, (), generator=generator))] = True
    given = tokens.clone()
    given[:, -BLOCK:][masked] = MASK
    return F.cross_entropy(model(given).logits[:, -BLOCK:][masked], tokens[:, -BLOCK:][masked])


def _next(model: BlockLM, tokens: Tensor, generator: torch.Generator) -> Tensor:
    return F.cross_entropy(model(tokens[:, :-1]).logits.flatten(0, 1), tokens[:, 1:].flatten())


def _measured(pipe: Any, handle: Any, asked: Tensor, threshold: float, words: list[str]) -> dict[str, Any]:
    """Calls of the model, positions, seconds, and how many of the finished sentences are sentences."""
    calls, fed, seconds, right, of = 0, 0, 0.0, 0, 0
    for seed, ids in enumerate(asked.split(1)):
        pipe.model.fed.clear()
        begun = time.process_time()
        generator = torch.Generator().manual_seed(seed)
        found = pipe(input_ids=ids, threshold=threshold, generator=generator, **CALL).sequences[0].tolist()
        seconds += time.process_time() - begun
        calls += handle.report.steps
        fed += sum(pipe.model.fed)
        row = ids[0].tolist() + found
        ends = [-1, *(place for place, token in enumerate(row) if token == EOS)]
        for begin, end in pairwise(ends):
            if end >= ASKED:  # its end was written
                said = " ".join(words[t - 2] if 2 <= t < len(words) + 2 else "?" for t in row[begin + 1 : end])
                right, of = right + bool(SENTENCE.fullmatch(said)), of + 1
    return {
        "tokens_a_call": round(WRITTEN * len(asked) / calls, 3), "calls": calls, "positions": fed,
        "cpu_seconds": round(seconds, 3), "sentences": of, "right": round(right / max(of, 1), 4),
    }  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
