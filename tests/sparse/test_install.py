"""Sparse attention in live pipelines: its exact ends, what it refuses, what it says, and that it leaves no trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fastdiff
from fastdiff.attention import Attention
from fastdiff.errors import BadConfig, UnsupportedModel
from fastdiff.pipelines.families import anatomies
from fastdiff.pipelines.sparse import install
from tests import tiny
from tests.near import apart
from tests.state import differences, snapshot

STEPS = 4
SHORT = {"min_tokens": 1, "block": 4}
SPARSE = {"sparse": "sparge", "keep": 0.3, **SHORT}
EVERYTHING = {"sparse": "sparge", "keep": 1.0, **SHORT}


def run(name: str, attention: dict[str, Any] | None, **call: Any) -> tuple[torch.Tensor, dict[str, Any], Any]:
    """The picture, what the report says of attention, and the handle."""
    pipe = tiny.make(name)
    handle = fastdiff.accelerate(pipe, **({} if attention is None else {"attention": attention}))
    picture = tiny.run(pipe, name, steps=STEPS, **call)
    return picture, handle.report.to_dict()["attention"], handle


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_everything_kept_is_dense_and_less_is_not(name):
    plain = tiny.run(tiny.make(name), name, steps=STEPS)
    same, told, _ = run(name, EVERYTHING)
    (counts,) = told.values()
    assert apart(same, plain) < 1e-4 and counts["sparse"] and counts["density"] == 1
    other, told, handle = run(name, SPARSE)
    (counts,) = told.values()
    assert apart(other, plain) > 1e-3 and counts["density"] < 1
    assert f"{counts['sparse']} attention calls sparse (density {counts['density']:.2f})" in str(handle.report)


@pytest.mark.parametrize("name", tiny.VIDEO)
def test_radial_knows_the_frames_of_videos(name):
    plain = tiny.run(tiny.make(name), name, steps=STEPS)
    same, told, _ = run(name, {"sparse": "radial", "decay": 64.0, **SHORT})
    (counts,) = told.values()
    assert apart(same, plain) < 1e-4 and counts["sparse"] and counts["density"] == 1


def test_radial_of_a_long_video_leaves_blocks_out():
    pipe = tiny.make("wan")
    handle = fastdiff.accelerate(pipe, attention={"sparse": "radial", "min_tokens": 1, "block": 2, "decay": 0.1})
    tiny.run(pipe, "wan", steps=STEPS, num_frames=33, output_type="latent")
    assert handle.report.attention["transformer"]["density"] < 0.9


def test_short_attention_stays_dense_and_is_said_aloud():
    plain = tiny.run(tiny.make("sd3"), "sd3", steps=STEPS)
    picture, told, handle = run("sd3", {"sparse": "sparge"})
    assert torch.equal(picture, plain) and told["transformer"]["sparse"] == 0
    (why,) = told["transformer"]["why_dense"]
    assert why == f"of fewer than {Attention().min_tokens} tokens"
    assert f"attention.sparse did nothing: attention calls that stayed dense: {told['transformer']['dense']} {why}" in (
        " ".join(handle.report.notes)
    )


@pytest.mark.parametrize(
    ("guards", "why"),
    [
        ({"warmup_steps": STEPS}, "in dense steps"),
        ({"warmup_steps": 1, "cooldown_steps": 3}, "in dense steps"),
        ({"dense_layers": 9}, "in dense layers"),
    ],
    ids=str,
)
def test_guards_leave_steps_and_layers_dense(guards, why):
    plain = tiny.run(tiny.make("wan"), "wan", steps=STEPS)
    picture, told, _ = run("wan", SPARSE | guards)
    assert torch.equal(picture, plain) and set(told["transformer"]["why_dense"]) == {why}


def test_a_choice_is_kept_for_the_interval_by_each_half_of_guidance(monkeypatch):
    made: list[torch.Tensor] = []
    choose = install.sparge

    def counted(*given: Any) -> torch.Tensor:
        made.append(choose(*given))
        return made[-1]

    monkeypatch.setattr(install, "sparge", counted)
    _, told, _ = run("wan", SPARSE)
    each = len(made)
    assert each == told["transformer"]["sparse"]
    made.clear()
    run("wan", SPARSE | {"interval": 2})
    assert len(made) == each / 2
    made.clear()
    run("wan", SPARSE | {"interval": STEPS})  # one for each layer and half of guidance
    layers = each // STEPS // 2
    assert len(made) == 2 * layers
    assert any(not torch.equal(made[k], made[k + layers]) for k in range(layers)), "halves choose for themselves"


def test_what_is_chosen_once_is_what_is_chosen_again_where_nothing_changes(monkeypatch):
    monkeypatch.setattr(install, "sparge", lambda query, key, picture, how, scale: _band(query, how.block))
    once, _, _ = run("wan", SPARSE | {"interval": STEPS})
    assert torch.equal(once, run("wan", SPARSE)[0])


def _band(query: torch.Tensor, block: int) -> torch.Tensor:
    count = -(-query.shape[-2] // block)
    return torch.eye(count, dtype=torch.bool).expand(*query.shape[:2], -1, -1)


def test_a_picture_does_not_depend_on_its_neighbours_in_the_batch():
    generators = [torch.Generator().manual_seed(k) for k in (3, 4)]
    both, _, _ = run("sd3", SPARSE, prompt=["cat", "dog"], generator=generators)
    alone, _, _ = run("sd3", SPARSE, prompt="dog", generator=torch.Generator().manual_seed(4))
    assert apart(both[1:], alone) < 1e-4


def test_a_second_call_equals_a_fresh_process_and_restore_leaves_no_trace():
    pipe = tiny.make("flux")
    plain = tiny.run(pipe, "flux", steps=STEPS)
    before = snapshot(pipe)
    handle = fastdiff.accelerate(pipe, attention=SPARSE | {"interval": 3})
    tiny.run(pipe, "flux", steps=STEPS, prompt="dog", height=48)
    assert torch.equal(tiny.run(pipe, "flux", steps=STEPS), run("flux", SPARSE | {"interval": 3})[0])
    handle.restore()
    assert torch.equal(tiny.run(pipe, "flux", steps=STEPS), plain) and differences(before, snapshot(pipe)) == []


def test_an_exception_leaves_no_choice_behind():
    pipe = tiny.make("wan")
    handle = fastdiff.accelerate(pipe, attention=SPARSE | {"interval": 9})

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiny.run(pipe, "wan", steps=STEPS, prompt="dog", callback_on_step_end=fail)
    assert handle.clock.run is None
    assert torch.equal(tiny.run(pipe, "wan", steps=STEPS), run("wan", SPARSE | {"interval": 9})[0])


@pytest.mark.parametrize("how", [{"is_causal": True}, {"attn_mask": torch.zeros(1, 1, 1, 1)}, {"dropout_p": 0.5}])
def test_attention_that_the_model_masks_stays_dense(how, monkeypatch):
    own = F.scaled_dot_product_attention
    intercept = install.Intercept

    def masked(attend: Any) -> Any:
        return intercept(lambda query, key, value, **more: attend(query, key, value, **more | how))

    monkeypatch.setattr(install, "Intercept", masked)
    _, told, _ = run("pixart", SPARSE)
    assert set(told["transformer"]["why_dense"]) == {"masked by the model"} and told["transformer"]["sparse"] == 0
    assert F.scaled_dot_product_attention is own


def test_caching_and_sparse_attention_go_together():
    pipe = tiny.make("wan")
    handle = fastdiff.accelerate(pipe, cache={"method": "taylorseer", "interval": 2}, attention=EVERYTHING)
    cached = tiny.run(pipe, "wan", steps=STEPS)
    told = handle.report.attention["transformer"]
    alone = tiny.make("wan")
    fastdiff.accelerate(alone, cache={"method": "taylorseer", "interval": 2})
    assert handle.report.cached and told["sparse"] and apart(cached, tiny.run(alone, "wan", steps=STEPS)) < 1e-4


@pytest.mark.parametrize(
    ("levers", "error", "says"),
    [
        ({"parallel": {"method": "ulysses"}}, BadConfig, "ulysses gives each rank a part"),
        ({"parallel": {"method": "ring"}}, BadConfig, r"or take parallel\.method = cfg"),
        ({"compile": {"enabled": True}}, BadConfig, "compiled graphs cannot hold a choice"),
    ],
    ids=["ulysses", "ring", "compile"],
)
def test_levers_that_do_not_go_with_it_are_refused(levers, error, says):
    pipe = tiny.make("sd3")
    before = snapshot(pipe)
    with pytest.raises(error, match=says):
        install.install_sparse(anatomies(pipe)[0], fastdiff.Config(attention=SPARSE, **levers), None, None, None)
    assert differences(before, snapshot(pipe)) == []


def test_models_whose_text_nobody_told_of_are_refused():
    with pytest.raises(UnsupportedModel, match="radial goes by the frames"):
        fastdiff.accelerate(tiny.make("sd15"), attention={"sparse": "radial"})
    pipe = tiny.make("pixart")
    with (
        fastdiff.accelerate(pipe, attention={"sparse": "radial", "min_tokens": 1}),
        pytest.raises(UnsupportedModel, match="radial goes by the frames of a video; take sparge"),
    ):
        tiny.run(pipe, "pixart", steps=STEPS)
    from tests import language

    with pytest.raises(UnsupportedModel, match="which tokens of a llada2 are the text's is not described"):
        fastdiff.accelerate(language.make(), attention={"sparse": "sparge"})


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"keep": 0.5}, r"attention\.sparse = None has no use for keep"),
        ({"sparse": "radial", "keep": 0.5, "interval": 2}, "= radial has no use for interval, keep"),
        ({"sparse": "sparge", "decay": 0.5}, "= sparge has no use for decay"),
        ({"sparse": "sparge", "keep": 0.5, "mass": 0.9}, "leave out one"),
        (
            {"sparse": "sparge", "backend": "xformers"},
            r"the backend xformers does not call; leave out attention\.backend",
        ),
        ({"sparse": "hip"}, "attention.sparse = 'hip'"),
    ],
    ids=str,
)
def test_settings_that_mean_nothing_are_refused(settings, says):
    with pytest.raises(BadConfig, match=says):
        fastdiff.Config(attention=settings)


def test_the_settings_survive_json():
    config = fastdiff.Config(attention=SPARSE | {"interval": 4})
    assert fastdiff.Config.from_json(config.model_dump_json()) == config
