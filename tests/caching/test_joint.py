"""Steps of three kinds: what each computes, and what is put in the place of the rest."""

import pytest
import torch

import fastdiff
from fastdiff.errors import BadConfig
from tests import tiny

KINDS = ["full", "full", "conditional", "partial", "conditional", "full"]


def drawn(pipe, name="sd15", steps=6, **cache):
    with fastdiff.accelerate(pipe, cache={"method": "joint", **cache}) as fast:
        return tiny.run(pipe, name, steps=steps), fast.report


def rows_of(pipe, **cache):
    """Rows that each call of the innermost layer had."""
    seen = []
    hook = tiny.deepest_leaf(pipe).register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    try:
        _, report = drawn(pipe, **cache)
    finally:
        hook.remove()
    return seen, report


def test_each_step_computes_what_its_kind_says():
    """Two rows a picture with guidance, one without, and none inside a site that is predicted."""
    rows, report = rows_of(tiny.make("sd15"), kinds=KINDS)
    assert rows == [2, 2, 1, 1, 2]
    assert (report.steps, report.computed) == (6, 3)


@pytest.mark.parametrize("name", ["sd15", "sd3"])
def test_a_difference_that_moves_on_a_line_is_guessed_exactly(name):
    """With weights that are given: u = c + 2 d_1 - d_2 + 0 news is what the predictor gives on an even axis."""
    pipe = tiny.make(name)
    kinds = ["full", "full", "conditional", "full", "full", "full"]
    own, _ = drawn(pipe, name, kinds=kinds, coordinate="step")
    told, _ = drawn(pipe, name, kinds=kinds, guesses={2: (2.0, -1.0, 0.0)})
    other, _ = drawn(pipe, name, kinds=kinds, guesses={2: (2.0, -1.0, 0.5)})
    assert torch.equal(own, told) and not torch.allclose(own, other)


def test_the_news_of_the_conditional_output_are_added_to_the_unconditional_one():
    """w = (1, 0), v = -1: u = c + (u_1 - c_1) - (c - c_1) = u_1, the last unconditional output itself."""
    pipe = tiny.make("sd15")
    outputs = []

    def heard(_, args, kwargs, output):
        outputs.append((output[0] if isinstance(output, tuple) else output.sample).chunk(2))

    with fastdiff.accelerate(
        pipe, cache={"method": "joint", "kinds": ["full", "full", "conditional", "full"], "guesses": {2: (1, 0, -1)}}
    ):
        hook = pipe.unet.register_forward_hook(heard, with_kwargs=True)
        tiny.run(pipe, "sd15", steps=4)
        hook.remove()
    (_, _), (before, _), (after, _), _ = outputs
    assert torch.allclose(after, before, atol=1e-6)


def test_a_run_of_other_steps_is_computed_whole_and_says_so():
    pipe = tiny.make("sd15")
    plain = tiny.run(pipe, "sd15", steps=5)
    found, report = drawn(pipe, steps=5, kinds=KINDS)
    assert torch.equal(found, plain)
    assert any("every step is computed whole" in note for note in report.notes)


def test_guards_overrule_the_kinds():
    rows, _ = rows_of(tiny.make("sd15"), kinds=KINDS, cooldown_steps=2)
    assert rows == [2, 2, 1, 2, 2]


def test_a_kind_that_is_none_is_refused():
    with pytest.raises(BadConfig, match="full"):
        fastdiff.accelerate(tiny.make("sd15"), cache={"method": "joint", "kinds": ["half"]})
