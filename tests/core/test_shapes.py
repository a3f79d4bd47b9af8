"""The embedded world: scenes are deterministic, splits apart, and the checker marks what it should."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from fastdiff.bench.checker import mark, parse, summary
from fastdiff.bench.scenes import BACKGROUNDS, COLOURS, SHAPES, SIZE, Scene, labels, render, scenes

COUNT = 400


@pytest.fixture(scope="module")
def sampled() -> list[Scene]:
    return scenes(5, COUNT, held_out=True)


@pytest.fixture(scope="module")
def images(sampled) -> list[np.ndarray]:
    return [render(scene) for scene in sampled]


def test_the_checker_finds_the_renderer_s_images_right(sampled, images):
    told = summary([mark(image, scene) for image, scene in zip(images, sampled, strict=True)])
    assert told["all_correct"] >= 0.97 and told["prompt_accuracy"] >= 0.99


def test_the_checker_finds_shuffled_captions_near_chance(sampled, images):
    """Chance is what an unrelated image of the same world scores: 1 of 5 shapes, 1 of 6 colours and so on."""
    others = sampled[1:] + sampled[:1]
    told = summary([mark(image, scene) for image, scene in zip(images, others, strict=True)])
    assert told["all_correct"] <= 0.03
    assert told["shape"] < 0.45 and told["colour"] < 0.45, "the best of two matches, hence more than 1 in 5"
    assert told["background"] < 0.4 and told["relation"] < 0.4


def test_the_checker_finds_noise_and_emptiness_wrong(sampled):
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8) for _ in range(20)]
    empty = np.full((SIZE, SIZE, 3), 238, np.uint8)
    marks = [mark(image, scene) for image, scene in zip([*noise, *[empty] * 20], sampled, strict=False)]
    assert not any(m.all_correct for m in marks) and summary(marks)["prompt_accuracy"] < 0.3


@pytest.mark.parametrize(
    ("change", "kind"),
    [({"shape": "other"}, "shape"), ({"colour": "other"}, "colour"), ({"background": "other"}, "background")],
)
def test_one_wrong_slot_is_found_as_that_slot(sampled, images, change, kind):
    """The image stays, the caption asks for something else in one slot."""
    found = 0
    checked = [i for i, scene in enumerate(sampled) if scene.named_background is not None][:100]
    for i in checked:
        scene, (first, *rest) = sampled[i], sampled[i].things
        if kind == "background":
            wrong = next(b for b in BACKGROUNDS if b != scene.background)
            asked = dataclasses.replace(scene, named_background=wrong)
        else:
            known = SHAPES if kind == "shape" else tuple(COLOURS)
            wrong = next(k for k in known if k not in {getattr(t, kind) for t in scene.things})
            asked = dataclasses.replace(scene, things=(dataclasses.replace(first, **{kind: wrong}), *rest))
        marked = mark(images[i], asked)
        found += {k for k in marked.asked if marked.right[k] < marked.asked[k]} == {kind}
    assert found >= 0.95 * len(checked)


def test_the_wrong_relation_is_found(sampled, images):
    opposite = {"above": "below", "below": "above", "left": "right", "right": "left"}
    pairs = [(i, s) for i, s in enumerate(sampled) if s.relation][:60]
    wrong = [mark(images[i], dataclasses.replace(s, relation=opposite[s.relation])).right["relation"] for i, s in pairs]
    distinct = [s.things[0].shape != s.things[1].shape or s.things[0].colour != s.things[1].colour for _, s in pairs]
    assert sum(w for w, d in zip(wrong, distinct, strict=True) if d) <= 2


def test_scenes_are_seeded():
    assert scenes(1, 20, held_out=False) == scenes(1, 20, held_out=False) != scenes(2, 20, held_out=False)
    assert scenes(1, 20, held_out=False)[:5] == scenes(1, 5, held_out=False)
    scene = scenes(1, 1, held_out=False)[0]
    assert np.array_equal(render(scene), render(scene)) and render(scene).dtype == np.uint8


def test_the_splits_share_no_caption(sampled):
    training = {scene.caption for scene in scenes(3, 3000, held_out=False)}
    held_out = {scene.caption for scene in sampled}
    assert not training & held_out
    assert all(scene.held_out for scene in sampled) and len(held_out) > 0.5 * COUNT


def test_captions_name_what_is_drawn(sampled):
    for scene in sampled:
        for thing in scene.things:
            assert thing.shape in scene.caption and thing.colour in scene.caption
        assert (scene.named_background is None) == (" background" not in scene.caption)
        assert (scene.relation is None) == (len(scene.things) == 1)


def test_objects_lie_inside_the_picture_and_apart(sampled, images):
    for scene, image in zip(sampled, images, strict=True):
        for thing in scene.things:
            assert thing.radius <= thing.x <= SIZE - thing.radius and thing.radius <= thing.y <= SIZE - thing.radius
            assert thing.radius >= 9.5
        assert len(parse(image)[1]) == len(scene.things) or scene.things[0].size == "large"


def test_labels_are_where_the_objects_are(sampled):
    for scene in sampled[:50]:
        shape, colour = labels(scene, 16)
        assert set(np.unique(shape)) - {0} == {SHAPES.index(t.shape) + 1 for t in scene.things}
        assert set(np.unique(colour)) - {0} == {list(COLOURS).index(t.colour) + 1 for t in scene.things}


@pytest.mark.parametrize("image", [np.zeros((32, 32, 3), np.uint8), np.zeros((SIZE, SIZE, 3), np.float32)])
def test_an_image_of_another_size_or_type_is_refused(image, sampled):
    with pytest.raises(ValueError, match=r"expected a uint8 image of shape \(64, 64, 3\)"):
        mark(image, sampled[0])
