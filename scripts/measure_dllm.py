"""What does `fast_dllm` save on a language model of random weights? Pairs of calls, plain and cached, in turns.

python scripts/measure_dllm.py --json benchmarks/fast_dllm.json
"""

from __future__ import annotations

import json as jsonlib
import statistics
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import fastdiff
from fastdiff import output
from fastdiff.bench.row import command, environment
from fastdiff.machine import package_version
from tests.language import MASK, BlockLM, pipeline, prompt

MODEL = {"layers": 6, "width": 256, "heads": 8}
CALL = {
    "gen_length": 256, "block_length": 32, "num_inference_steps": 32, "mask_token_id": MASK, "eos_early_stop": False,
    "output_type": "seq",
}  # fmt: skip
CASES: dict[str, tuple[int | None, dict[str, Any]]] = {
    "block-causal, editing": (32, {}),
    "block-causal, no editing": (32, {"editing_threshold": None}),
    "bidirectional, no editing": (None, {"editing_threshold": None}),
}


def main(
    json: Annotated[Path | None, typer.Option(help="write the result here; it is printed too")] = None,
    rounds: Annotated[int, typer.Option(min=3, help="pairs of calls a case")] = 5,
    prompt_length: Annotated[int, typer.Option(min=1)] = 256,
    overwrite: Annotated[bool, typer.Option("--overwrite")] = False,
) -> None:
    output.check([json], overwrite)
    torch.set_num_threads(1)
    results = [
        {"case": name, **_measured(block, prompt(prompt_length), CALL | call, rounds), "command": command()}
        for name, (block, call) in CASES.items()
    ]
    text = jsonlib.dumps(results, indent=2)
    if json is not None:
        output.write(json, lambda part: part.write_text(text + "\n", encoding="utf-8"))
    print(text)


def _measured(block: int | None, ids: Tensor, call: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Work and seconds of both; the first cached call verifies, so it stands apart from the later ones."""
    plain, cached = _seeded(block), _seeded(block)
    handle = fastdiff.accelerate(cached, cache="fast_dllm")
    blocks: list[Tensor] = []
    watch = plain.model.register_forward_pre_hook(lambda _, args: blocks.append(args[0][:, -32:].clone()))
    expected, before = _write(plain, ids, call), _work(plain)
    watch.remove()
    first, verifying = _write(cached, ids, call), _work(cached)
    said = list(handle.report.notes)
    ratios = []
    for number in range(rounds):
        seconds = {}
        for pipe in (plain, cached) if number % 2 else (cached, plain):
            began = time.process_time()
            tokens = _write(pipe, ids, call)
            seconds[id(pipe)] = time.process_time() - began
            work = _work(pipe)
            if pipe is cached:
                after, same = work, float((tokens == expected).float().mean())
        ratios.append(seconds[id(plain)] / seconds[id(cached)])
    report = handle.report
    return {
        "model": {"attention": f"blocks of {block}" if block else "bidirectional", **MODEL, "weights": "random"},
        "prompt": ids.shape[1],
        "call": {key: value for key, value in call.items() if key not in ("output_type", "mask_token_id")},
        "steps": report.steps, "computed": report.computed, "cached": report.cached,
        "positions_times_layers": {"plain": before, "first_call": verifying, "later_calls": after},
        "work_ratio": round(before / after, 3),
        "work_ratio_first_call": round(before / verifying, 3),
        "pairs": rounds,
        "cpu_seconds_ratio_median": round(statistics.median(ratios), 3),
        "cpu_seconds_ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
        "same_tokens_first_call": float((first == expected).float().mean()),
        "same_tokens": same,
        "notes_first_call": said,
        **_delayed(blocks),
        "environment": {**environment(cached), "transformers": package_version("transformers")},
    }  # fmt: skip


def _seeded(block: int | None) -> Any:
    torch.manual_seed(0)
    return pipeline(BlockLM(block, **MODEL))


def _write(pipe: Any, ids: Tensor, call: dict[str, Any]) -> Tensor:
    pipe.model.fed.clear()
    return pipe(input_ids=ids, **call).sequences


def _work(pipe: Any) -> int:
    """Positions fed in the last call, times layers."""
    return sum(pipe.model.fed) * len(pipe.model.layers)


def _delayed(blocks: list[Tensor]) -> dict[str, Any]:
    """What delayed caching would have left out of the blocks at the very best, and what it would have missed."""
    pairs = [(a, b) for a, b in pairwise(blocks) if not (b == MASK).all()]
    out = sum(int(((a != MASK) & (a == b)).sum()) for a, b in pairs)
    return {
        "delayed_caching": {
            "share_of_block_positions_left_out_at_best": round(out / sum(b.numel() for b in blocks), 3),
            "finished_tokens_edited_later": sum(int(((a != MASK) & (a != b)).sum()) for a, b in pairs),
        }
    }


if __name__ == "__main__":
    typer.run(main)
