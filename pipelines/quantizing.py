"""Quantizes the components of a pipeline: which ones, in whose place, and what the report says of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

from fastdiff.anatomy import Family, fingerprint
from fastdiff.clock import Run, Step, StepClock
from fastdiff.config import Source, layers_of, resolve
from fastdiff.errors import BadConfig, UnknownName, UnsupportedModel
from fastdiff.patch import PatchSet
from fastdiff.plans import Each
from fastdiff.quant.activations import Present
from fastdiff.quant.base import QuantMethod
from fastdiff.quant.calibration import Calibration, Origin
from fastdiff.quant.install import Learned, Put, QuantReport, quantize_model
from fastdiff.quant.layer import QLayer
from fastdiff.quant.observe import noise_share
from fastdiff.quant.prune import PrunePlan
from fastdiff.quant.reversible import stand_in
from fastdiff.quant.standing import Standing, standing
from fastdiff.quant.timed import verdict
from fastdiff.recorder import Recorder
from fastdiff.weights import foreign, require

from .families import Anatomy
from .wrapped import bare, unwrapped

Watch = Callable[[int, int], None]


@dataclass
class Quantized:
    """What was done to a pipeline, and what its layers must be told while it runs."""

    method: QuantMethod
    report: QuantReport
    calibration: Calibration | None = None
    presents: dict[str, Present] = field(default_factory=dict)
    unplanned: list[str] = field(default_factory=list)

    def listen(self, clock: StepClock, recorder: Recorder, patches: PatchSet) -> None:
        origin = self.calibration.origin if self.calibration else None
        for present in self.presents.values():
            follow(present, origin, clock, patches)

        def started(run: Run) -> None:
            for note in [*self.notes(), *(self.calibration.differences(run) if self.calibration else [])]:
                recorder.note(note)

        def ended(run: Run) -> None:
            for said in self.timed():
                recorder.note(said)

        clock.on_start.append(started)
        clock.on_end.append(ended)

    def timed(self) -> list[str]:
        """What the clock chose so far, by component, where there was something to choose."""
        said = {name: verdict(present.used, present.times) for name, present in self.presents.items()}
        return [f"timed in {name}: {text}" for name, text in said.items() if text]

    def notes(self, freed: bool = False) -> list[str]:
        """What the report of a run should say."""
        report, kept = self.report, "the float layers are freed" if freed else "the float layers are kept for restore()"
        said = [f"quant {report.summary()}; {kept}"]
        if self.unplanned:
            said.append(f"{', '.join(self.unplanned)} stays float: the plan of bits is for another denoiser")
        if isinstance(self.method.prune, PrunePlan | Each):
            said.append(f"the prune plan {self.method.prune.summary()}")
        eight = [layer for layer in report.layers if layer.activations == "int8"]
        if eight and not self.calibration:
            said.append("ranges of activations are found at each call; calibrated ones are faster (fastdiff quantize)")
        elif report.static < len(eight):
            said.append(
                f"{len(eight) - report.static} layers were not seen in calibration; they find ranges at each call"
            )
        slow = sum(layer.kernel == "reference" for layer in report.layers)
        if slow:
            said.append(
                f"speed: no for {slow} layers, whose weights are made float at each call: they save memory only"
            )
        if report.patched:
            said.append(f"{report.patched} layers have a forward or hooks that somebody put on them, and stay float")
        passed = Counter(layer.said for layer in report.layers if layer.said)
        said += report.notes
        return [*said, *(f"{count} layers passed over {reason}" for reason, count in passed.most_common(3))]


def follow(present: Present, origin: Origin | None, clock: StepClock, patches: PatchSet) -> None:
    """Tell the layers of a component the bucket of each call of the denoiser."""

    def called(step: Step) -> None:
        present.bucket = None if origin is None else origin.bucket(noise_share(step.run, step.index))

    def ended(run: Run) -> None:
        present.bucket = None
        present.forget()

    clock.on_call.append(called)
    clock.on_end.append(ended)
    patches.set(present, "clocked", True)


def targets(pipe: Any, method: QuantMethod, found: list[Anatomy]) -> dict[str, nn.Module]:
    """The components that a method names, by name; of wrapped ones what is inside.

    Raises UnknownName for one that is not there, UnsupportedModel for one that is compiled or quantized, or whose
    weights are elsewhere.
    """
    modules = {name: bare(part) for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    denoisers = {anatomy.component: anatomy.denoiser for anatomy in found}
    kinds: dict[str, Mapping[str, nn.Module]] = {
        "denoiser": denoisers,
        "text_encoder": {name: part for name, part in modules.items() if name.startswith("text_encoder")},
        "vae": {name: part for name, part in modules.items() if name == "vae"},
    }
    chosen: dict[str, nn.Module] = {}
    for name in method.components:
        part = kinds.get(name) or ({name: modules[name]} if name in modules else {})
        if not part:
            raise UnknownName(f"component of {type(pipe).__name__}", name, [*kinds, *modules])
        chosen |= part
    for name, module in chosen.items():
        if name in modules:
            unwrapped(name, pipe.components[name])
        require(module, name)
        refuse_quantized(name, module)
    return chosen


def refuse_quantized(name: str, module: nn.Module) -> None:
    """Two quantizations of one weight make no sense; what another library quantized runs as it is."""
    if (whose := foreign(module)) is not None:
        raise UnsupportedModel(
            f"{name} is quantized already, {whose}; it runs as it is with the other levers: leave out `quant`"
        )
    if standing(module) is not None:
        raise UnsupportedModel(f"{name} is quantized already, by fastdiff; leave out `quant`, or load the float model")


def methods_of(
    method: QuantMethod, parts: Mapping[str, nn.Module], found: list[Anatomy]
) -> dict[str, QuantMethod]:  # fmt: skip
    """The method for each component, with its own plan; without those that the plans of several leave out."""
    own = {name: method.of(name, name == found[0].component) for name in parts}
    return {name: one for name, one in own.items() if one is not None}


def quantize_parts(
    pipe: Any, method: QuantMethod, found: list[Anatomy], put: Put, *, calibration: Calibration | None = None,
    learned: Mapping[str, Learned] | None = None, watch: Watch | None = None,
) -> Quantized:  # fmt: skip
    """Put quantized layers in their places in all components that the method names.

    learned: what rounds weights, by component.

    Raises BadConfig for a calibration of another model or other options, or rounding that needs data it has not.
    """
    if method.rounding == "flexround" and learned is None:
        raise BadConfig(
            "rounding = flexround learns from calls of the model; use fastdiff quantize or fastdiff.quantize, or "
            "rounding = mse"
        )
    parts = targets(pipe, method, found)
    if calibration is None and method.ranges is not None:
        calibration = Calibration.load(method.ranges)
    if calibration is not None:
        check_options(method, calibration.origin)
        for name in parts.keys() & {anatomy.component for anatomy in found}:
            calibration.check(name, print_of(name, parts[name]))
    elif method.smooth is not None or method.split:
        raise BadConfig("quant.smooth and quant.split need ranges: calibrate, and name the file as quant.ranges")
    done = Quantized(method, QuantReport(method.method), calibration)
    if isinstance(method.prune, float):
        raise BadConfig(
            f"quant.prune = {method.prune:g} is planned on prompts: use fastdiff quantize, or name a plan that it made"
        )
    methods = methods_of(method, parts, found)
    done.unplanned = [name for name in parts if name not in methods]
    for anatomy in found:
        if anatomy.component in methods and isinstance(gone := methods[anatomy.component].prune, PrunePlan):
            gone.install(anatomy, put)
    for name, own in methods.items():
        done.presents[name] = Present()
        ranges, rounds = calibration.of(name) if calibration else None, (learned or {}).get(name)
        quantize_model(
            parts[name], name, own, put, done.presents[name], done.report, ranges=ranges, learned=rounds, watch=watch
        )
    return done


def method_of(config: Source, family: Family | None, name: str | None) -> QuantMethod:
    """The quant method of a config, or of a method's name, for a model. Raises BadConfig where there is none."""
    if isinstance(config, str) and not config.endswith((".toml", ".json")):
        config = {"quant": config}
    method = resolve(layers_of(config), family, name).config.quant
    if not isinstance(method, QuantMethod):
        raise BadConfig("the config has no [quant] with a method; add --set quant.method=w8a8")
    return method


def quantize_for_good(
    pipe: Any, method: QuantMethod, found: list[Anatomy], *, calibration: Calibration | None = None,
    learned: Mapping[str, Learned] | None = None,
) -> Quantized:  # fmt: skip
    """`quantize_parts`, and the float layers are let go."""
    parts = targets(pipe, method, found)
    methods = methods_of(method, parts, found)
    with PatchSet() as patches:
        done = quantize_parts(pipe, method, found, patches.replace, calibration=calibration, learned=learned)
    for name, present in done.presents.items():
        origin = done.calibration.origin if done.calibration else None
        Standing(methods[name].model_dump(mode="json"), present, origin).attach(parts[name])
    return done


def check_options(method: QuantMethod, origin: Origin) -> None:
    for option in ("smooth", "split"):
        made, asked = getattr(origin, option), getattr(method, option)
        if made != asked:
            raise BadConfig(
                f"the calibration was made with quant.{option} = {made}, the config has {asked}; calibrate again"
            )


def print_of(name: str, module: nn.Module) -> str:
    """Class and configuration of a component."""
    return fingerprint(Anatomy(module, Family(name, "unet"), name))


def installed(
    pipe: Any, method: QuantMethod, found: list[Anatomy], clock: StepClock, recorder: Recorder, patches: PatchSet,
    by_clock: bool,
) -> Quantized:  # fmt: skip
    """Quantize a live pipeline reversibly: the float layers come back with the patches.

    by_clock: whether layers may be timed at their first call, and run as float where that is faster."""

    def put(parent: nn.Module, name: str, instead: nn.Module) -> None:
        if "state_dict" not in vars(instead):  # a layer that is held in two places is put twice
            floats = parent.get_submodule(name)
            # what is never asked to run waits on the CPU until restore()
            parked = method.speed == "smallest" and next(floats.parameters()).device.type not in ("cpu", "meta")
            stand_in(instead, floats, parked)
            if parked:
                patches.call(partial(floats.to, "cpu"), lambda: floats.to(next(instead.buffers()).device))
            if isinstance(instead, QLayer):
                instead.floats = (floats,)
        patches.replace(parent, name, instead)

    done = quantize_parts(pipe, method, found, put)
    for present in done.presents.values():
        present.by_clock = by_clock
    if not by_clock and method.speed != "smallest":
        done.report.notes.append("layers are not timed under parallel, where ranks must agree, and under compile")
    done.listen(clock, recorder, patches)
    if hasattr(pipe, "fuse_lora"):
        patches.set(pipe, "fuse_lora", refuse_fusing)
    return done


def refuse_fusing(*_: Any, **__: Any) -> None:
    raise UnsupportedModel(
        "LoRA weights cannot be fused into quantized ones; leave them on top, which works, or fuse before quantizing"
    )


def follow_standing(
    found: list[Anatomy], clock: StepClock, recorder: Recorder, patches: PatchSet, by_clock: bool
) -> None:
    """A pipeline whose denoiser was quantized for good: its layers go by the step, the report says what they are."""
    states = {anatomy.component: state for anatomy in found if (state := standing(anatomy.denoiser)) is not None}
    if not states:
        return
    for state in states.values():
        follow(state.present, state.origin, clock, patches)
        patches.set(state.present, "by_clock", by_clock)
    for layer in (part for anatomy in found for part in anatomy.denoiser.modules() if isinstance(part, QLayer)):
        layer.ready()  # before a graph is made: choosing cannot be in one

    def started(run: Run) -> None:
        for name, state in states.items():
            recorder.note(f"{name} is quantized for good: {state.method['method']}")

    clock.on_start.append(started)
