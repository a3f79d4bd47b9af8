"""Finds what can be removed from a denoiser for free, and repairs what is lost (HierarchicalPrune without training)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor, nn

from fastdiff.affine import AffineFit, channel_rows
from fastdiff.anatomy import Anatomy, fingerprint
from fastdiff.errors import BadModel
from fastdiff.weights import require

from .calls import Calls, swapped
from .components import Component, components, early
from .prune import Map, Measured, PrunePlan, Removal, Removed

Watch = Callable[[int, int], None]
Pair = tuple[Tensor, Tensor]  # what a component was given on a stream, and what it added to it
# layers that have channels second, and last
_SECOND = (nn.modules.conv._ConvNd, nn.GroupNorm, nn.modules.batchnorm._NormBase)
_LAST = (nn.Linear, nn.LayerNorm, nn.RMSNorm)


class Form(TypedDict):
    """Whether a component gives a tuple, and which dimension holds its channels, if a layer told."""

    wrapped: bool
    axis: Literal[1, -1] | None


def prune(
    calls: Calls, *, max_error: float = 1e-3, ridge: float = 1e-3, rank: int = 0, patience: int = 5,
    protect: float = 0.0, watch: Watch | None = None,
) -> PrunePlan:  # fmt: skip
    """The plan that removes components, those of least cost first, while the denoiser's output stays within
    `max_error`, a relative squared error on calls that the repair was not fitted on.

    rank: of the map that repairs, on top of a scale and a shift by channel. patience: the search ends after so many
    components in a row that cost too much. protect: the share of each stack, from its start, that stays whole (the
    paper's positional weight preservation). Fits are sequential: each sees the model without what went before.
    """
    anatomy = calls.anatomy
    require(anatomy.denoiser, anatomy.component)
    fitted, judged = calls.halves()
    forms = _forms(anatomy, judged, components(anatomy))
    table, whole = _sensitivities(anatomy, judged, forms, watch), early(anatomy, protect)
    removed: dict[str, Removal] = {}
    error, misses = 0.0, 0
    for component, _ in sorted(table, key=lambda row: row[1].cost):
        paths = [path for path in component.paths if not within(path, removed)]
        if not paths or misses >= patience or any(within(path, whole) for path in paths):
            continue
        tried = dict(removed)
        for path in paths:
            with _without(anatomy, tried):
                repair = _repaired(anatomy, path, component.residual, fitted, ridge, rank)
            tried = {p: r for p, r in tried.items() if not p.startswith(f"{path}.")} | {path: repair}
        with _without(anatomy, tried):
            now = judged.error()
        if now <= max_error:
            removed, error, misses = tried, now, 0
        else:
            misses += 1
    gone = sum(_parameters(anatomy, (path,)) for path in removed)
    return PrunePlan(
        denoiser=fingerprint(anatomy), removed=tuple(removed.values()), error=error, parameters=gone,
        measured=tuple(found for _, found in table), protected=whole,
    )  # fmt: skip


def _sensitivities(
    anatomy: Anatomy, calls: Calls, forms: Mapping[Component, list[Removal]], watch: Watch | None
) -> list[tuple[Component, Measured]]:
    """Each component left out by itself, without repair."""
    if not math.isfinite(start := calls.error()):
        raise BadModel(f"the denoiser's own output is not finite ({start}); prune a model that works")
    out = []
    for number, (component, nothing) in enumerate(forms.items(), 1):
        with _without(anatomy, {removal.path: removal for removal in nothing}):
            error = calls.error()
        weight = math.exp(component.depth - 1)  # the paper's position prior: late blocks are more prunable
        measured = Measured(
            component=component.name, kind=component.kind, depth=component.depth, error=error, cost=error / weight,
            parameters=_parameters(anatomy, component.paths),
        )  # fmt: skip
        out.append((component, measured))
        if watch is not None:
            watch(number, len(forms))
    return out


def _forms(anatomy: Anatomy, calls: Calls, wanted: Sequence[Component]) -> dict[Component, list[Removal]]:
    """Removals without repair of the components that add to streams of the width they are given; others are passed
    over, as are those that do not run."""
    found: dict[str, Removal] = {}
    paths = {path: component.residual for component in wanted for path in component.paths}
    with _heard(anatomy, paths, lambda path, pairs, form: found.setdefault(path, _zero(path, paths, pairs, form))):
        calls.only([0]).error()
    return {c: [found[path] for path in c.paths] for c in wanted if all(path in found for path in c.paths)}


def _zero(path: str, residual: Mapping[str, bool], pairs: list[Pair], form: Form) -> Removal:
    maps = []
    for x, _ in pairs:
        nothing = torch.zeros(channel_rows(x, form["axis"]).shape[-1])
        maps.append(Map.of(nothing, nothing))
    return Removal(path=path, residual=residual[path], maps=tuple(maps), **form)


def _repaired(anatomy: Anatomy, path: str, residual: bool, calls: Calls, ridge: float, rank: int) -> Removal:
    """A removal whose maps are fitted to what the component adds in the model as it is now."""
    fits: list[_Fit] = []
    forms: list[Form] = []

    def seen(_: str, pairs: list[Pair], form: Form) -> None:
        fits.extend(_Fit(ridge, rank, form["axis"]) for _ in pairs[len(fits) :])
        forms.append(form)
        for fit, pair in zip(fits, pairs, strict=True):
            fit.add(*pair)

    with _heard(anatomy, {path: residual}, seen):
        calls.error()
    return Removal(path=path, residual=residual, maps=tuple(fit.solve() for fit in fits), **forms[0])


class _Fit:
    """Ridge regression of y on x over tokens: by channel, or, with a rank, the best map of that rank (reduced-rank
    regression: the full least-squares map, projected on the leading directions of what it explains)."""

    def __init__(self, ridge: float, rank: int, axis: Literal[1, -1] | None = None) -> None:
        self.ridge, self.rank, self.axis = ridge, rank, axis
        self.diagonal = AffineFit(ridge, axis)
        self.sums: list[Tensor] = []  # count, x, y, x^T x, x^T y

    def add(self, x: Tensor, y: Tensor) -> None:
        self.diagonal.add(x, x + y)  # pulled towards x, that is towards adding nothing
        if self.rank:
            rows, wanted = channel_rows(x, self.axis), channel_rows(y, self.axis)
            count = torch.tensor(float(len(rows)), dtype=torch.float64)
            new = [count, rows.sum(0), wanted.sum(0), rows.T @ rows, rows.T @ wanted]
            self.sums = [a + b for a, b in zip(self.sums, new, strict=True)] if self.sums else new

    def solve(self) -> Map:
        scale, shift = self.diagonal.solve()
        if not self.rank:
            return Map.of(scale - 1, shift)
        count, x, y, xx, xy = self.sums
        x, y = x / count, y / count
        inner, cross = xx / count - torch.outer(x, x), xy / count - torch.outer(x, y)
        unit = torch.eye(len(x), dtype=inner.dtype, device=inner.device)
        full = torch.linalg.solve(inner + (self.ridge * inner.diagonal().mean() + 1e-12) * unit, cross)
        _, directions = torch.linalg.eigh(full.T @ inner @ full)
        up = directions[:, -self.rank :].T  # rank x channels
        down = (full @ up.T).T
        return Map.of(torch.zeros_like(x), y - (x @ down.T) @ up, (down, up))


@contextmanager
def _heard(
    anatomy: Anatomy, paths: Mapping[str, bool], seen: Callable[[str, list[Pair], Form], Any]
) -> Iterator[None]:  # fmt: skip
    """Shows (path, what was given and added by stream, form) of each call of these modules whose outputs are as wide as
    what they are given."""
    axes: dict[str, Literal[1, -1]] = {}

    def hook(path: str) -> Callable[..., None]:
        def ended(_module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            names = ("hidden_states", "encoder_hidden_states")
            given = [args[k] if k < len(args) else kwargs.get(name) for k, name in enumerate(names)]
            if given[0] is None:
                given[0] = next((v for v in kwargs.values() if isinstance(v, Tensor)), None)
            made = list(output) if isinstance(output, tuple) else [output]
            pairs = list(zip(given, made, strict=False))
            added: list[Pair] = []
            for x, y in pairs:
                if not isinstance(x, Tensor) or not isinstance(y, Tensor) or x.shape != y.shape:
                    return
                added.append((x.detach(), (y - x if paths[path] else y).detach()))
            if len(made) <= len(given):
                seen(path, added, {"wrapped": isinstance(output, tuple), "axis": axes.get(path)})

        return ended

    with ExitStack() as hooks:
        for path in paths:
            module = anatomy.denoiser.get_submodule(path)
            hooks.enter_context(module.register_forward_hook(hook(path), with_kwargs=True))
            for leaf in (leaf for leaf in module.modules() if isinstance(leaf, (*_SECOND, *_LAST))):
                hooks.enter_context(leaf.register_forward_pre_hook(_tells(path, axes), with_kwargs=True))
        yield


def _tells(path: str, axes: dict[str, Literal[1, -1]]) -> Callable[..., None]:
    """The first layer inside that is given more than one vector an image tells where channels are."""

    def look(leaf: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        x = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
        if path not in axes and x is not None and x.ndim > 2:
            axes[path] = 1 if isinstance(leaf, _SECOND) else -1

    return look


@contextmanager
def _without(anatomy: Anatomy, removed: Mapping[str, Removal]) -> Iterator[None]:
    device = next(anatomy.denoiser.parameters()).device
    with swapped(anatomy.denoiser, {path: Removed(removal).to(device) for path, removal in removed.items()}):
        yield


def within(path: str, removed: Iterable[str]) -> bool:
    """Whether a module is one of those, or a part of one."""
    return any(path == other or path.startswith(f"{other}.") for other in removed)


def _parameters(anatomy: Anatomy, paths: Sequence[str]) -> int:
    return sum(p.numel() for path in paths for p in anatomy.denoiser.get_submodule(path).parameters())
