"""What a quantization plans before it begins, on calls of the denoisers: bits, what to remove, learned rounding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastdiff.errors import BadConfig
from fastdiff.plans import Each
from fastdiff.quant.base import QuantMethod
from fastdiff.quant.build import chosen
from fastdiff.quant.calls import Calls
from fastdiff.quant.components import roots
from fastdiff.quant.flexround import FlexRound
from fastdiff.quant.prune import PrunePlan
from fastdiff.quant.pruning import prune
from fastdiff.quant.reconstruct import Reconstruction
from fastdiff.quant.schemes.mixed import BitPlan, Mixed

from .calibrate import Watch
from .families import anatomies
from .hearing import hear_each, planned
from .quantizing import targets

Heard = Mapping[str, Calls]


def plan(
    pipe: Any, method: QuantMethod, prompts: Sequence[str], *, moments: int = 4, seed: int = 0, batch: int = 4,
    watch: Watch | None = None, **call: Any,
) -> BitPlan | PrunePlan | Each:  # fmt: skip
    """What `quantize` plans before it begins: what `prune`, a number, removes, or the bits of `mixed`; of several
    denoisers for each. A plan of bits that is there is made again, from what it measured.

    Draws `prompts` once with the pipeline's arguments `call`; all is measured on the calls heard at `moments` steps
    spread over the runs, in all branches. Raises BadConfig for a method that plans nothing.
    """
    if not isinstance(method.prune, float) and not isinstance(method, Mixed):
        raise BadConfig("there is nothing to plan: set quant.prune to an error, 0.03 say, or quant.method to mixed")
    targets(pipe, method, anatomies(pipe))
    heard = hear_each(pipe, prompts, moments=moments, seed=seed, batch=batch, **call)
    if isinstance(method, Mixed):
        return planned(heard, lambda calls: method.planned(calls, watch))
    made: Any = with_plans(method, heard, watch).prune
    return made


def with_plans(method: QuantMethod, heard: Heard | None, watch: Watch | None) -> QuantMethod:
    """The method with the plans that it leaves to be made on calls of the denoisers: of bits, or of what to remove."""
    if isinstance(method, Mixed) and method.plan is None:
        if heard is None:
            raise BadConfig("mixed measures the denoiser's layers: give prompts, or a plan of bits as quant.plan")
        bits: Mixed = method
        return bits.model_copy(update={"plan": planned(heard, lambda calls: bits.planned(calls, watch))})
    if isinstance(method.prune, float):
        if heard is None:
            raise BadConfig(f"quant.prune = {method.prune:g} measures the denoiser: give prompts, or a plan")
        most, whole = method.prune**2, method.protect
        found = planned(heard, lambda calls: prune(calls, max_error=most, protect=whole, watch=watch))
        return method.model_copy(update={"prune": found, "protect": 0.0})
    return method


def learned_by(method: QuantMethod, heard: Heard | None) -> dict[str, FlexRound | Reconstruction] | None:
    """What learns the rounding of weights from calls, by denoiser, if the method wants that."""
    if method.rounding != "flexround":
        return None
    if heard is None or method.smooth is not None or method.split or method.components != ("denoiser",):
        raise BadConfig(
            "rounding = flexround learns from calls of the denoiser: give prompts, and leave out smooth, split and "
            "other components; or take rounding = mse"
        )
    return {name: _learner(method.of(name, name == next(iter(heard))), calls) for name, calls in heard.items()}


def _learner(own: QuantMethod | None, calls: Calls) -> FlexRound | Reconstruction:
    if own is None or own.reconstruct == "layer":
        return FlexRound(calls)
    if calls.anatomy.opaque or calls.anatomy.family.kind == "language":
        raise calls.anatomy.without("blocks that rounding could be learned for", "set quant.reconstruct to layer")
    return Reconstruction(FlexRound(calls), chosen(own, calls.anatomy.denoiser), dict(roots(calls.anatomy)))
