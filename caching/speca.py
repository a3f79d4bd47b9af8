"""The guard `speca`: at a step that is left out, the last block runs on the inputs that are forecast for it.

SpeCa: Accelerating Diffusion Transformers with Speculative Feature Caching, https://arxiv.org/abs/2509.11628. As in its
authors' code, a step whose forecast fails is taken as it is, and the next one is computed; the bound falls from step to
step, b d^(i / (T - 1)).
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from functools import wraps
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from fastdiff.anatomy import parameters
from fastdiff.clock import Run
from fastdiff.errors import BadConfig, UnsupportedModel
from fastdiff.patch import PatchSet, current_forward

from .predictors import combine
from .region import Memory, owned
from .session import Session
from .sites import stack_blocks
from .verify import FIRST, Verify, apart


class Checks(Verify):
    """What the block said in one run. A step that the plan skips is computed where that of the step before failed; with
    a bound of 0 all are."""

    def __init__(self, bounds: Sequence[float], agree: Callable[[Tensor], Tensor] | None) -> None:
        super().__init__(bounds, lambda *_: [], agree)
        self.blocks = 0  # that ran for it

    def check(self, index: int, memories: Sequence[Memory]) -> None:
        """What is computed needs no check."""

    def fails(self, index: int) -> bool:
        failing = self.bounds[index] <= 0 or (index - 1 in self._read and self._fails(index - 1))
        if failing:
            self._computed.add(index)
        return failing

    def tell(self, report: MutableMapping[str, int]) -> None:
        super().tell(report)
        report["blocks run"] = report.get("blocks run", 0) + self.blocks


class Speculating(Session):
    """A session that checks what it leaves out with the last module of its last region: a block of a stack on the
    forecast of what enters it, or a layer on what enters it after forecasts.

    Raises BadConfig where the whole model is left out, UnsupportedModel where there are no blocks, or where the last
    one reads what others give past the streams.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        region, self._unit = self.regions[-1], self.regions[-1].units[-1]
        if self._unit is self.anatomy.denoiser:
            raise BadConfig(
                f'guard = "speca" runs the last block that is left out, but {self.method.method} leaves out the model '
                'as one; set a site inside of it ("stack"), or guard = "verify"'
            )
        stack_blocks(self.anatomy)
        self._streams: tuple[str, ...] = ()
        if len(region.units) > 1:
            if self.anatomy.family.long_skips:
                raise UnsupportedModel(
                    f'guard = "speca": the last block of {self.anatomy.family.name} reads what the first ones give; '
                    'set guard = "verify"'
                )
            self._streams = self.anatomy.stack_of(self._unit).takes
        self._order = parameters(self._unit)
        self._entered: dict[int, dict[int, list[Any]]] = {}  # by branch and step: the streams of the last block

    def attach(self, patches: PatchSet) -> None:
        self._plain = current_forward(self._unit)
        super().attach(patches)
        patches.wrap_forward(self._unit, self._checked)

    def _checks(self, run: Run) -> Verify:
        self._entered = {}
        first = FIRST if self.method.verify_bound is None else self.method.verify_bound
        last = max(1, run.total - 1)
        return Checks([first * self.method.verify_decay ** (i / last) for i in range(run.total)], self.agree)

    def _checked(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(forward)
        def checked(*args: Any, **kwargs: Any) -> Any:
            memory = None if self._current is None else self._current[-1]
            if memory is None or self.clock.now is None or self._verify is None:
                return forward(*args, **kwargs)
            step, given = self.clock.now, dict(zip(self._order, args, strict=False)) | kwargs
            known = self._entered.setdefault(step.branch, {})
            if memory.keep and self._streams:
                known[step.index] = owned([given[stream] for stream in self._streams])
            output = forward(*args, **kwargs)
            if memory.skipping and memory.visits <= 1 and not memory.torn:
                placed = self._order[: len(args)]  # called in the same way: a compiled block has a graph for each
                self._compare(step.index, memory, known, given, placed, output)
            return output

        return checked

    def _compare(
        self, index: int, memory: Memory, known: dict[int, list[Any]], given: dict[str, Any], placed: Sequence[str],
        output: Any,
    ) -> None:  # fmt: skip
        assert isinstance(self._verify, Checks)
        for step in set(known) - set(memory.indices):
            del known[step]
        anchors = memory.indices[-len(memory.factors) :] if self._streams else []
        if not set(anchors) <= set(known):  # a call of it was made otherwise
            return
        for place, stream in enumerate(self._streams):
            column = [known[anchor][place] for anchor in anchors]
            if isinstance(column[-1], Tensor):  # a copy: a block may write into what it is given
                given[stream] = combine(memory.factors, column).clone()
        first = [given.pop(name) for name in placed]
        truth = pytree.tree_leaves(self._plain(*first, **given))
        self._verify.blocks += 1
        self._verify.saw(index, [apart(pytree.tree_leaves(output), truth)])
