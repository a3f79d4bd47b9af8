"""Procedural captioned scenes: one or two outlined shapes on a graded background (numpy only, seeded).

The world is small on purpose: a scene that a tiny model obeys says more about an accelerator than a rich one
that it garbles. Outlines, stripes and anti-aliasing are there so that caching and quantization errors show.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

SIZE = 64
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 40, 40),
    "green": (40, 165, 60),
    "blue": (45, 80, 220),
    "yellow": (245, 215, 40),
    "purple": (140, 55, 185),
    "cyan": (45, 205, 220),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (238, 238, 238),
    "gray": (150, 150, 150),
    "black": (25, 25, 30),
    "pink": (240, 185, 210),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring")
TEXTURES = ("plain", "striped")
RADII = {"small": 10.0, "large": 14.5}
RELATIONS = {"above": "above", "below": "below", "left": "to the left of", "right": "to the right of"}
HELD_OUT_SHARE = 16  # one caption in sixteen is never trained on

_INK = np.array((20, 20, 28), np.float32)
_LUMA = np.array((0.30, 0.59, 0.11), np.float32)
_STRIPE_PERIOD = 8.0
_OUTLINE = 1.5
Y, X = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) + 0.5


@dataclass(frozen=True)
class Thing:
    """One object: centre and radius in pixels, `phase` shifts the stripes."""

    shape: str
    colour: str
    texture: str
    size: str
    x: float
    y: float
    radius: float
    phase: float


@dataclass(frozen=True)
class Scene:
    """What a caption asks for. `named_background` is None where the caption leaves the background open."""

    things: tuple[Thing, ...]
    background: str
    gradient: float
    gradient_axis: int
    relation: str | None
    caption: str
    named_background: str | None

    @property
    def held_out(self) -> bool:
        """Split by caption, so that no evaluated sentence was ever trained on."""
        return crc32(self.caption.encode()) % HELD_OUT_SHARE == 0


def signed_distance(shape: str, radius: float, x: NDArray, y: NDArray) -> NDArray:
    """Distance in pixels from the outline of `shape` centred on the origin; negative inside."""
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "ring":
        return np.abs(np.hypot(x, y) - radius * 0.72) - radius * 0.28
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - radius * 0.88
    if shape == "cross":
        a, b, arm = np.abs(x), np.abs(y), radius * 0.36
        return np.minimum(np.maximum(a - arm, b - radius), np.maximum(a - radius, b - arm))
    if shape == "triangle":
        side = np.hypot(1.9, 1.08)
        slanted = (1.9 * np.abs(x) - 1.08 * (y + radius * 1.05)) / side
        return np.maximum(slanted, y - radius * 0.85)
    raise ValueError(f"unknown shape {shape!r}; one of {', '.join(SHAPES)}")


def _body(thing: Thing, x: NDArray, y: NDArray) -> NDArray:
    colour = np.array(COLOURS[thing.colour], np.float32)
    if thing.texture == "plain":
        return np.broadcast_to(colour, (*x.shape, 3))
    bright = colour @ _LUMA > 135
    other = colour * 0.38 if bright else colour * 0.12 + np.float32(255 * 0.88)
    wave = np.sin((x + y) * (2 * np.pi / _STRIPE_PERIOD) + thing.phase)
    mix = np.clip(wave * 0.8 + 0.5, 0, 1)[..., None]
    return colour * mix + other * (1 - mix)


def render(scene: Scene) -> NDArray[np.uint8]:
    """The scene as an anti-aliased image, uint8 (64, 64, 3)."""
    ramp = ((Y if scene.gradient_axis == 0 else X) / SIZE)[..., None] - 0.5
    image = np.array(BACKGROUNDS[scene.background], np.float32) + scene.gradient * 255 * ramp
    for thing in scene.things:
        x, y = X - thing.x, Y - thing.y
        distance = signed_distance(thing.shape, thing.radius, x, y)
        inside = np.clip(0.5 - distance, 0, 1)[..., None]
        ink = np.clip(0.5 + distance + _OUTLINE, 0, 1)[..., None]
        image = image * (1 - inside) + inside * (_body(thing, x, y) * (1 - ink) + _INK * ink)
    return np.clip(image, 0, 255).astype(np.uint8)


def labels(scene: Scene, cells: int) -> NDArray[np.int64]:
    """(2, cells, cells) shape and colour label of each cell, 0 where no object covers a quarter of it."""
    out = np.zeros((2, cells, cells), np.int64)
    block = SIZE // cells
    for thing in scene.things:
        filled = np.hypot(X - thing.x, Y - thing.y) - thing.radius
        if thing.shape != "ring":
            filled = signed_distance(thing.shape, thing.radius, X - thing.x, Y - thing.y)
        cover = (filled < 0).reshape(cells, block, cells, block).mean((1, 3)) > 0.25
        out[0][cover] = SHAPES.index(thing.shape) + 1
        out[1][cover] = list(COLOURS).index(thing.colour) + 1
    return out


def _phrase(thing: Thing, name_size: bool) -> str:
    words = [thing.size] * name_size + [thing.texture] * (thing.texture != "plain") + [thing.colour, thing.shape]
    return "a " + " ".join(words)


def sample(rng: np.random.Generator) -> Scene:
    """One random scene with its caption."""

    def pick(options: Collection[str]) -> str:
        return list(options)[rng.integers(len(options))]

    def near(centre: float, spread: float) -> float:
        return centre + float(rng.uniform(-spread, spread))

    def thing(size: str, x: float, y: float) -> Thing:
        radius = RADII[size] * near(1, 0.04)
        texture = "plain" if rng.random() < 0.75 else "striped"
        return Thing(pick(SHAPES), pick(COLOURS), texture, size, x, y, radius, float(rng.uniform(0, 2 * np.pi)))

    if rng.random() < 0.4:
        relation: str | None = None
        things: tuple[Thing, ...] = (thing(pick(RADII), near(32, 5), near(32, 5)),)
        text = _phrase(things[0], rng.random() < 0.85)
    else:
        relation = pick(RELATIONS)
        sizes = (("small", "small"), ("large", "small"), ("small", "large"))[rng.integers(3)]
        order = sizes if relation in ("above", "left") else sizes[::-1]
        near_radius, far_radius = RADII[order[0]] * 1.06, RADII[order[1]] * 1.06
        margin = (SIZE - 2 * (near_radius + far_radius)) / 3
        along = (near(margin + near_radius, 1.0), near(SIZE - margin - far_radius, 1.0))
        along = along if relation in ("above", "left") else along[::-1]
        across = (near(32, 4), near(32, 4))
        spots = zip(across, along, strict=True) if relation in ("above", "below") else zip(along, across, strict=True)
        things = tuple(thing(size, x, y) for size, (x, y) in zip(sizes, spots, strict=True))
        first, second = (_phrase(t, rng.random() < 0.85) for t in things)
        text = f"{first} {RELATIONS[relation]} {second}"
    background = pick(BACKGROUNDS)
    named = background if rng.random() < 0.8 else None
    caption = text + (f" on a {named} background" if named else "")
    return Scene(things, background, float(rng.uniform(-0.15, 0.15)), int(rng.integers(2)), relation, caption, named)


def scenes(seed: int, count: int, *, held_out: bool) -> list[Scene]:
    """`count` scenes of the training split or of the held-out captions, the same for the same seed."""
    rng = np.random.default_rng(seed)
    found: list[Scene] = []
    while len(found) < count:
        scene = sample(rng)
        if scene.held_out == held_out:
            found.append(scene)
    return found
