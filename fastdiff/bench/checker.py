"""Does an image obey its caption? Marks a generated scene slot by slot, with no learned part (numpy only).

The background is a plane fitted to the border, objects are what departs from it, a shape is the template with the
highest overlap, a colour is a vote in CIELAB. Sizes and stripes are not marked.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import permutations
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastdiff.bench.scenes import BACKGROUNDS, COLOURS, SHAPES, SIZE, Scene, X, Y, signed_distance

_GRID = 24
_DEPARTURE = 26  # of 255: how far from the background plane a pixel must be to belong to an object
_SMALLEST = 25  # pixels; anything smaller is noise, not an object


@dataclass(frozen=True)
class Seen:
    """One object found in an image; x and y in pixels."""

    shape: str
    colour: str
    x: float
    y: float


@dataclass(frozen=True)
class Mark:
    """Slots asked for and slots right, by kind: count, shape, colour, relation, background."""

    asked: dict[str, int]
    right: dict[str, int]

    @property
    def accuracy(self) -> float:
        """Share of right slots in [0, 1]: `prompt_accuracy`."""
        return sum(self.right.values()) / sum(self.asked.values())

    @property
    def all_correct(self) -> bool:
        return self.right == self.asked


Match: TypeAlias = tuple[Seen | None, ...]


def _lab(rgb: ArrayLike) -> NDArray:
    c = np.asarray(rgb, np.float32) / 255
    c = np.where(c > 0.04045, ((c + 0.055) / 1.055) ** 2.4, c / 12.92)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]], np.float32)
    xyz = c @ to_xyz.T / np.array([0.9505, 1, 1.089], np.float32)
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], -1)


def _resize(mask: NDArray) -> NDArray:
    """Bounding box of a boolean mask, bilinearly resized to _GRID x _GRID."""
    rows, columns = np.where(mask.any(1))[0], np.where(mask.any(0))[0]
    crop = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].astype(np.float32)

    def taps(length: int) -> tuple[NDArray, NDArray, NDArray]:
        at = (np.arange(_GRID) + 0.5) * length / _GRID - 0.5
        low = np.clip(np.floor(at).astype(int), 0, length - 1)
        return low, np.clip(low + 1, 0, length - 1), np.clip(at - low, 0, 1)

    y0, y1, fy = taps(crop.shape[0])
    x0, x1, fx = taps(crop.shape[1])
    top = crop[y0][:, x0] * (1 - fx) + crop[y0][:, x1] * fx
    bottom = crop[y1][:, x0] * (1 - fx) + crop[y1][:, x1] * fx
    return top * (1 - fy[:, None]) + bottom * fy[:, None]


@cache
def _templates() -> dict[str, list[NDArray]]:
    middle = SIZE / 2
    return {
        shape: [
            _resize(signed_distance(shape, radius, X - middle - shift, Y - middle) < 0)
            for radius in (8.5, 10.0, 12.0, 14.5)
            for shift in (0.0, 0.5)
        ]
        for shape in SHAPES
    }


def _components(mask: NDArray) -> list[NDArray]:
    """4-connected regions of at least _SMALLEST pixels, as boolean masks."""
    todo, found = mask.copy(), []
    while todo.any():
        start = np.unravel_index(int(todo.argmax()), todo.shape)
        region, stack = np.zeros_like(todo), [start]
        todo[start] = False
        while stack:
            y, x = stack.pop()
            region[y, x] = True
            for spot in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
                if 0 <= spot[0] < SIZE and 0 <= spot[1] < SIZE and todo[spot]:
                    todo[spot] = False
                    stack.append(spot)
        if region.sum() >= _SMALLEST:
            found.append(region)
    return found


def _inner(mask: NDArray) -> NDArray:
    """The mask without its outline, as far as anything is left of it."""
    for _ in range(2):
        p = np.pad(mask, 1)
        smaller = mask & p[:-2, 1:-1] & p[2:, 1:-1] & p[1:-1, :-2] & p[1:-1, 2:]
        if smaller.sum() < 8:
            break
        mask = smaller
    return mask


def _nearest(palette: dict[str, tuple[int, int, int]], lab: NDArray) -> tuple[NDArray, NDArray]:
    """Index of and distance to the nearest palette entry of each row."""
    distance = np.sqrt(((lab[:, None] - _lab(list(palette.values()))[None]) ** 2).sum(-1))
    return distance.argmin(1), distance.min(1)


def _colour(image: NDArray, mask: NDArray) -> str:
    index, distance = _nearest(COLOURS, _lab(image[_inner(mask)]))
    sure = distance < 26  # leaves ink and the other stripe out of the vote
    votes = np.bincount(index[sure] if sure.any() else index, minlength=len(COLOURS))
    return list(COLOURS)[int(votes.argmax())]


def _shape(mask: NDArray) -> str:
    seen = _resize(mask)
    overlap = {
        shape: max(np.minimum(seen, t).sum() / np.maximum(seen, t).sum() for t in candidates)
        for shape, candidates in _templates().items()
    }
    return max(overlap, key=lambda shape: overlap[shape])


def parse(image: NDArray[np.uint8]) -> tuple[str, list[Seen]]:
    """Background name and objects of an image, uint8 (64, 64, 3)."""
    if image.shape != (SIZE, SIZE, 3) or image.dtype != np.uint8:
        raise ValueError(f"expected a uint8 image of shape ({SIZE}, {SIZE}, 3), got {image.dtype} {image.shape}")
    pixels = image.astype(np.float32)
    border = np.ones((SIZE, SIZE), bool)
    border[2:-2, 2:-2] = False
    basis = np.stack([np.ones_like(X), X / SIZE - 0.5, Y / SIZE - 0.5], -1)
    used, departure = border.copy(), np.zeros((SIZE, SIZE), np.float32)
    plane = np.zeros((3, 3), np.float32)
    for _ in range(3):  # objects that touch the border are dropped from the fit
        plane = np.linalg.lstsq(basis[used], pixels[used], rcond=None)[0]
        departure = np.abs(pixels - basis @ plane).max(-1)
        used = border & (departure < max(18, np.quantile(departure[border], 0.6)))
    background = list(BACKGROUNDS)[int(_nearest(BACKGROUNDS, _lab(np.clip(plane[:1], 0, 255)))[0][0])]
    things = [
        Seen(_shape(m), _colour(image, m), float(X[m].mean()), float(Y[m].mean()))
        for m in _components(departure > _DEPARTURE)
    ]
    return background, things


def _relation(first: Seen, second: Seen) -> str:
    dx, dy = second.x - first.x, second.y - first.y
    if abs(dy) > abs(dx):
        return "above" if dy > 0 else "below"
    return "left" if dx > 0 else "right"


def mark(image: NDArray[np.uint8], scene: Scene) -> Mark:
    """Compare an image with what its caption asks for."""
    background, seen = parse(image)
    wanted = scene.things
    candidates: list[Seen | None] = [*seen[:5], *[None] * len(wanted)]

    def hits(match: Match, kind: str) -> int:
        return sum(s is not None and getattr(s, kind) == getattr(w, kind) for w, s in zip(wanted, match, strict=True))

    def related(match: Match) -> bool:
        first, second = match
        return first is not None and second is not None and _relation(first, second) == scene.relation

    def score(match: Match) -> tuple[int, bool]:
        return hits(match, "shape") + hits(match, "colour"), scene.relation is not None and related(match)

    best = max(permutations(candidates, len(wanted)), key=score)
    asked = {"count": 1, "shape": len(wanted), "colour": len(wanted)}
    right = {"count": int(len(seen) == len(wanted)), "shape": hits(best, "shape"), "colour": hits(best, "colour")}
    if scene.relation is not None:
        asked["relation"], right["relation"] = 1, int(related(best))
    if scene.named_background is not None:
        asked["background"], right["background"] = 1, int(background == scene.named_background)
    return Mark(asked, right)


def summary(marks: list[Mark]) -> dict[str, float]:
    """Means over images: `prompt_accuracy`, `all_correct` and the share of right slots of each kind."""
    out = {
        "prompt_accuracy": float(np.mean([m.accuracy for m in marks])),
        "all_correct": float(np.mean([m.all_correct for m in marks])),
    }
    for kind in ("count", "shape", "colour", "relation", "background"):
        asked = sum(m.asked.get(kind, 0) for m in marks)
        if asked:
            out[kind] = sum(m.right.get(kind, 0) for m in marks) / asked
    return out
