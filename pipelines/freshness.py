"""A plan of the layers that wait in a displaced run, made by all ranks on pictures that they draw together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastdiff.anatomy import Anatomy, fingerprint
from fastdiff.clock import StepClock
from fastdiff.config import Compile, Config
from fastdiff.errors import BadConfig
from fastdiff.parallel.bus import Bus
from fastdiff.parallel.displaced import Displaced
from fastdiff.parallel.probing import Probe
from fastdiff.parallel.waiting import LayerPlan, chosen
from fastdiff.recorder import Recorder

from .accelerate import put, restore
from .calibrate import Observed, Watch, draw_all
from .families import anatomies


def calibrate_layers(
    pipe: Any, config: Config, prompts: Sequence[str], *, moments: int = 4, seed: int = 0, batch: int = 4,
    watch: Watch | None = None, **call: Any,
) -> Config:  # fmt: skip
    """The config with the layers of its displaced method that gain most by waiting, within `parallel.sync_kb`.

    Called by all ranks of the method, which draw `prompts` together and exactly, with the pipeline's arguments `call`;
    at `moments` steps of each run the main denoiser is called once more for each layer. The other levers of the config
    are on, but no cache, and nothing is compiled. An accelerated pipeline is restored first.

    Raises BadConfig for a method that displaces nothing, and where there is no budget or nothing to choose.
    """
    method = config.parallel
    if not isinstance(method, Displaced) or method.sync_kb is None or method.step > 1:
        raise BadConfig(
            "layers that wait are chosen for parallel.method = distrifusion or pcpp with step = 1, and within "
            "parallel.sync_kb, kB of a picture and step: set both"
        )
    restore(pipe)
    found = anatomies(pipe)
    plain = method.model_copy(update={"sync_layers": (), "plan": None})
    probes: list[Probe] = []

    def bus() -> Bus:
        assert handle.crew is not None
        return handle.crew.bus

    def install(anatomy: Anatomy, clock: StepClock, recorder: Recorder) -> Probe:
        probes.append(Probe(anatomy, clock, bus, plain, moments))
        return probes[-1]

    levers = config.model_copy(update={"cache": None, "compile": Compile(), "parallel": plain})
    handle = Observed(pipe, levers, {found[0].component: install})
    put(handle, found)
    with handle:
        draw_all(handle, prompts, seed, batch, watch, call)
        table, ranks = probes[0].table(len(prompts)), bus().topology.patch
    budget = int(method.sync_kb * 1000)
    plan = LayerPlan(
        denoiser=fingerprint(found[0]), ranks=ranks, budget=budget, layers=chosen(table, budget), table=table
    )
    return config.model_copy(update={"parallel": plain.model_copy(update={"plan": plan})})
