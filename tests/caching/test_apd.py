"""apd: a ratio of 0 writes what the verifier writes, a ratio of 1 commits every proposal at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastdiff
from fastdiff.errors import BadConfig, BadModel, UnsupportedModel
from tests.language import MASK, VOCABULARY, BlockLM, llama, make, prompt, write
from tests.state import differences, snapshot

PLAIN = {"editing_threshold": None, "num_inference_steps": 8, "eos_early_stop": False}


def verifier(seed: int = 5) -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return llama().eval()


def fast(ratio: float, model: str = "block-causal", **settings: Any) -> tuple[Any, fastdiff.Accelerated]:
    pipe = make(model)
    cache = {"method": "apd", "verifier": verifier(), "ratio": ratio, **settings}
    return pipe, fastdiff.accelerate(pipe, cache=cache)


def autoregressive(ids: Tensor, count: int, noise: Tensor | None = None) -> Tensor:
    """What the verifier writes token by token: the likeliest, or by Gumbel noise (rows, tokens, vocabulary)."""
    model = verifier()
    for k in range(count):
        with torch.no_grad():
            logits = model(ids).logits[:, -1]
        logits[:, MASK] = -torch.inf
        scores = logits if noise is None else logits.log_softmax(-1) + noise[:, k]
        ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], 1)
    return ids


@pytest.mark.parametrize("ids", [prompt(19), prompt(24, batch=2, seed=1)], ids=["inside a block", "two rows"])
@pytest.mark.parametrize("prefix", [True, False])
def test_a_ratio_of_0_is_what_the_verifier_writes(ids, prefix):
    pipe, handle = fast(0.0, prefix=prefix)
    found = write(pipe, ids, **PLAIN)
    assert torch.equal(found, autoregressive(ids, 29)[:, ids.shape[1] :])
    assert "tokens of a row committed a step" in " ".join(handle.report.notes)


def test_with_a_temperature_a_ratio_of_0_is_a_sample_of_the_verifier():
    """Of the very noise: a table for each block from the call's generator."""
    generator = torch.Generator().manual_seed(7)
    tables = [torch.rand(1, 8, VOCABULARY, generator=generator) for _ in range(3)]
    noise = -(-torch.cat(tables, 1).log()).log()
    pipe, _ = fast(0.0)
    found = write(pipe, prompt(24), **PLAIN, gen_length=24, temperature=1.0, generator=torch.Generator().manual_seed(7))
    assert torch.equal(found, autoregressive(prompt(24), 24, noise)[:, 24:])
    assert not torch.equal(found, autoregressive(prompt(24), 24)[:, 24:])


def test_a_ratio_of_1_commits_all_proposals_at_once():
    pipe, handle = fast(1.0, prefix=False)
    found = write(pipe, prompt(24), **PLAIN, gen_length=24)
    assert len(pipe.model.fed) == handle.report.steps == 6  # for each block a call, and one that finds it done
    assert "apd: 8.00 tokens of a row committed a step" in handle.report.notes
    assert torch.equal(found, write(make(), prompt(24), **PLAIN, gen_length=24, threshold=0.0))


def test_the_prefix_cache_changes_no_token_and_saves_positions():
    (with_cache, handle), (without, _) = fast(0.6), fast(0.6, prefix=False)
    calls = {**PLAIN, "gen_length": 61}
    assert torch.equal(write(with_cache, **calls), write(without, **calls))
    assert sum(with_cache.model.fed) < 0.7 * sum(without.model.fed) and handle.report.cached


def test_between_the_ends_agreement_decides():
    steps = []
    for ratio in (0.0, 0.8, 1.0):
        pipe, handle = fast(ratio)
        assert not (write(pipe, prompt(24), **PLAIN, gen_length=40) == MASK).any()
        steps.append(handle.report.steps)
    assert steps[0] > steps[1] > steps[2] == 10


def test_rows_do_not_depend_on_each_other():
    pipe, _ = fast(0.7)
    both = write(pipe, prompt(13, batch=2, seed=3), **PLAIN)
    for row in range(2):
        assert torch.equal(
            write(fast(0.7)[0], prompt(13, batch=2, seed=3)[row : row + 1], **PLAIN), both[row : row + 1]
        )


def test_a_second_call_equals_a_fresh_one_and_restore_leaves_no_trace():
    pipe = make()
    plain = write(pipe, **PLAIN)
    pipe.model.fed.clear()
    before = snapshot(pipe)
    handle = fastdiff.accelerate(pipe, cache={"method": "apd", "verifier": verifier()})
    write(pipe, prompt(9, batch=3), **PLAIN)
    assert torch.equal(write(pipe, **PLAIN), write(fast(0.7)[0], **PLAIN))
    handle.restore()
    pipe.model.fed.clear()
    assert differences(before, snapshot(pipe)) == [] and torch.equal(write(pipe, **PLAIN), plain)


def test_early_stop_ends_the_run():
    pipe, handle = fast(0.0)
    token = next(t for t in write(pipe, **PLAIN)[0].tolist() if t not in prompt()[0])
    steps = handle.report.steps
    write(pipe, **PLAIN | {"eos_early_stop": True, "eos_token_id": token})
    assert handle.clock.run is None and handle.report.steps < steps


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ({"editing_threshold": 0.5}, "call the pipeline with editing_threshold = None"),
        ({"top_k": 5}, "without top_p and top_k"),
        ({"top_p": 0.9}, "without top_p and top_k"),
        ({"num_inference_steps": 4}, r"5 open tokens need num_inference_steps = 5, not 4"),
    ],
    ids=str,
)
def test_calls_that_ask_for_something_else_are_refused(call, says):
    pipe, _ = fast(0.5)
    with pytest.raises(UnsupportedModel, match=says):
        write(pipe, **PLAIN | call)
    assert torch.equal(write(pipe, **PLAIN), write(fast(0.5)[0], **PLAIN))


def test_a_verifier_that_is_none_is_refused():
    with pytest.raises(UnsupportedModel, match="the verifier is not causal"):
        write(fast(0.5, verifier=BlockLM(None).eval())[0], **PLAIN)
    small = llama()
    small.lm_head = torch.nn.Linear(small.config.hidden_size, VOCABULARY - 1)
    with pytest.raises(UnsupportedModel, match=f"knows {VOCABULARY - 1} tokens, the pipeline's model {VOCABULARY}"):
        write(fast(0.5, verifier=small.eval())[0], **PLAIN)


def test_a_verifier_is_read_from_its_directory(tmp_path):
    verifier().save_pretrained(tmp_path / "small")
    pipe, _ = fast(0.0, verifier=str(tmp_path / "small"))
    assert torch.equal(write(pipe, **PLAIN), write(fast(0.0)[0], **PLAIN))
    with pytest.raises(BadConfig, match=r"cache\.verifier: directory .* does not exist"):
        fast(0.0, verifier=str(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadModel, match="cannot be loaded"):
        fast(0.0, verifier=str(tmp_path / "empty"))
    with pytest.raises(BadConfig, match="give a model, or the directory of one"):
        fast(0.0, verifier="")
