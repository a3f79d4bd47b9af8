"""`accelerate`: the one place that orders the levers, and the handle that takes them back."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import diffusers
import torch
from diffusers import DiffusionPipeline

from fastdiff import strip
from fastdiff.caching.base import CacheMethod
from fastdiff.caching.methods.cachequant import CacheQuant
from fastdiff.caching.session import Session
from fastdiff.caching.speca import Speculating
from fastdiff.clock import WATCHED
from fastdiff.config import Resolved, Source, layers_of, resolve
from fastdiff.errors import BadConfig, FastdiffError, UnsupportedModel
from fastdiff.parallel.portions import require_shard
from fastdiff.patch import PatchSet, current_forward
from fastdiff.recorder import Recorder
from fastdiff.report import RunReport
from fastdiff.version import __version__

from . import texts
from .attention import install_backend
from .cachequant import correct_fed_layers
from .compile import check_cache, compile_blocks, compile_denoiser
from .families import Anatomy, anatomies
from .language import clock_of, with_verifier
from .loading import embedded_name
from .noise import watch_noise
from .quantizing import Quantized, follow_standing, installed
from .solving.install import install as install_solver
from .sparse.install import install_sparse
from .switching import with_second
from .together import check_shared
from .wrapped import refuse_compiled

if TYPE_CHECKING:
    from fastdiff.parallel.crew import Crew

HANDLE = "_fastdiff"


class Accelerated:
    """What `accelerate` did to a pipeline. `restore()` takes it back; as a context manager it does so at the end."""

    def __init__(self, pipe: Any, resolved: Resolved) -> None:
        self.pipe = pipe
        self.config, self.origins = resolved.config, resolved.origins
        self._patches = PatchSet()
        self.crew: Crew | None = None
        self.quantized: Quantized | None = None
        self.embeddings = texts.Embeddings(self.config.text.cache_mb << 20)
        self.keys = texts.Keys()
        self._listen()

    def _listen(self) -> None:
        self.clock = clock_of(self.pipe)
        self._recorder = Recorder(self.clock)

    @property
    def report(self) -> RunReport:
        """The last run's report."""
        if lost := self._patches.lost():
            self._recorder.note(
                f"the hooks below fastdiff's patches were replaced: {', '.join(lost)} runs as without them; accelerate "
                "the pipeline again"
            )
        return self._recorder.report

    @property
    def rank(self) -> int:
        """Which of the processes that share the work this is; 0 where it is the only one."""
        return self.crew.bus.topology.rank if self.crew is not None else 0

    @property
    def active(self) -> bool:
        return vars(self.pipe).get(HANDLE) is self

    def restore(self) -> None:
        """Put the pipeline back exactly as it was; does nothing if that has been done.

        Raises NotReversible, and changes nothing, if something else patched the same objects since.
        """
        if self.active:
            self.clock.check()
            self._patches.restore()

    def install(self, found: list[Anatomy]) -> None:
        """All of the config or, on an exception, nothing; may be called again after `restore()`."""
        self._listen()
        with self._patches as patches:
            self._quantize(found, patches)
            plan = install_solver(self.pipe, self.config, found[0], self.clock, self._recorder.note, patches)
            texts.install(self.pipe, self.config, found, (self.embeddings, self.keys), self.clock, patches)
            self._cached = self._methods(found, None if plan is None else plan.leaves_out)
            self.crew = self._meet(found)
            if self.crew is not None:
                patches.call(lambda: None, self.crew.bus.abort)
                if self.config.compile.enabled:
                    self.crew.compiled(self.config.compile.scope, patches)
            for anatomy in found:
                self._install_on(anatomy, patches)
            if self.crew is not None:
                self.crew.decoder(getattr(self.pipe, "vae", None), patches)
            patches.set(self.pipe, HANDLE, self)
            patches.refuse_copies(self.pipe)
            patches.call(self.clock.attach, self.clock.detach)

    def _quantize(self, found: list[Anatomy], patches: PatchSet) -> None:
        method: Any = self.config.quant
        by_clock = self.config.parallel is None and not self.config.compile.enabled
        if method is None:
            follow_standing(found, self.clock, self._recorder, patches, by_clock)
            return
        self.quantized = installed(self.pipe, method, found, self.clock, self._recorder, patches, by_clock)

    def _methods(self, found: list[Anatomy], planned: CacheMethod | None) -> dict[str, CacheMethod]:
        """The cache method, or what the solver's plan leaves out, for each denoiser that it can work on; that it cannot
        on others is said aloud."""
        cached: dict[str, CacheMethod] = {}
        refused: dict[str, FastdiffError] = {}
        method: Any = planned or self.config.cache
        for anatomy in found if method is not None else ():
            try:
                own = method.of(anatomy.component, anatomy is found[0])
                if own is None:
                    raise UnsupportedModel("the plan is not for it; calibrate again, which makes one for each denoiser")
                own.places(anatomy)
                own = with_verifier(own, anatomy)
                cached[anatomy.component] = with_second(own, anatomy, self.config.parallel is not None)
            except FastdiffError as error:
                refused[anatomy.component] = error
        first = refused.get(found[0].component)
        if first is not None and (len(refused) == len(found) or isinstance(first, BadConfig)):
            raise first
        for name, why in refused.items():
            note = f"the {name} is not cached: {str(why).splitlines()[0]}"
            warnings.warn(note, stacklevel=5)
            self.clock.on_start.append(lambda _, note=note: self._recorder.note(note))  # type: ignore[misc]
        return cached

    def _install_on(self, anatomy: Anatomy, patches: PatchSet) -> None:
        config = self.config
        if config.attention.backend is not None:
            install_backend(anatomy.denoiser, config.attention.backend, patches)
        install_sparse(anatomy, config, self.clock, self._recorder, patches)
        whole = config.compile.enabled and config.compile.scope == "denoiser"
        crew = self.crew
        outside = crew.inside(anatomy, patches) if crew is not None else None
        session = self._session(anatomy, whole)
        self._refuse_graphs(anatomy, session)
        if config.compile.enabled and session is not None:
            check_cache(session, config.compile)
        if config.compile.enabled and not whole:
            compile_blocks(anatomy, config.compile, patches)
        if crew is not None:
            crew.shelve(anatomy, [u for r in (session.regions if session else ()) for u in r.units], patches)
        if session is not None:
            if isinstance(session.method, CacheQuant):
                correct_fed_layers(session, session.method, anatomy, self.clock, patches)
            session.attach(patches)
            if crew is not None:
                session.agree = crew.agrees
                session.own = crew.cycle.own if crew.cycle is not None else None
                crew.forget.append(session.forget)
        if outside is not None:
            outside(patches)
        if whole:
            compile_denoiser(anatomy, config.compile, patches)
        if session is not None:
            session.attach_denoiser(patches)
            alone = crew is None and not config.compile.enabled
            watch_noise(session, patches, alone and anatomy.component in self._cached)
        if crew is not None:
            crew.outermost(anatomy, patches)
        self.clock.watch(anatomy.denoiser, anatomy.component, patches)
        patches.refuse_copies(anatomy.denoiser)

    def _meet(self, found: list[Anatomy]) -> Crew | None:
        """The other ranks of a parallel run, who must have the same model and config."""
        method: Any = self.config.parallel
        for anatomy in found:
            require_shard(anatomy.denoiser, method)
        if method is None:
            return None
        from fastdiff.parallel.crew import Crew, fingerprint

        dumped = self.config.model_dump(mode="json")
        settings = {
            f"{part}.{key}": str(value) for part, table in dumped.items() for key, value in (table or {}).items()
        }
        alike = {
            **{part: str(table and table.get("method")) for part, table in dumped.items()},
            **settings,
            "model": " ".join(fingerprint(anatomy.denoiser) for anatomy in found),
            "versions": f"torch {torch.__version__}, diffusers {diffusers.__version__}, ours {__version__}",
        }
        return Crew(method, self.clock, self._recorder, self.pipe.device, alike)

    def _refuse_graphs(self, anatomy: Anatomy, session: Session | None) -> None:
        """Blocks that were compiled already keep their graphs, where nothing in them is patched."""
        regions = session.regions if session is not None else ()
        touched = [module for region in regions for module in region.units]
        touched += [region.probe.module for region in regions if region.probe and region.probe.module is not None]
        if self.crew is not None and self.crew.bus.topology.patch > 1:
            touched += anatomy.denoiser.modules()
        refuse_compiled(anatomy.component, anatomy.denoiser, touched)

    def _session(self, anatomy: Anatomy, ahead: bool) -> Session | None:
        method = self._cached.get(anatomy.component)
        if method is None:
            return None
        if self.crew is not None:
            check_shared(method, self.crew.bus.topology, getattr(self.crew.method, "halves", False))
        why = "ranks and compiled graphs are for whole batches" if self.crew or self.config.compile.enabled else None
        kind = Speculating if method.guard == "speca" else Session
        return kind(method, anatomy, self.clock, self._recorder, ahead=ahead, whole=why)

    def __enter__(self) -> Accelerated:
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()

    def _title(self) -> str:
        levers = {k: v["method"] for k, v in self.config.model_dump(exclude_none=True).items() if "method" in v}
        return f"{type(self.pipe).__name__} {levers or 'nothing enabled'}{'' if self.active else ', restored'}"

    def __repr__(self) -> str:
        return f"<fastdiff {self._title()}: {self.report}>"

    def _repr_html_(self) -> str:
        """What notebooks show: one cell a step."""
        return strip.html(self.report, f"fastdiff {self._title()}")


def accelerate(pipe: DiffusionPipeline, config: Source = None, **levers: Any) -> Accelerated:
    """Patch a live pipeline.

    config: preset name, path of a .toml or .json file, dict or Config. Keywords (`cache=`, `parallel=`, `quant=`,
    `solver=`, `attention=`, `compile=`; a method name or a table) override it. A pipeline that is accelerated
    already is restored first.

    Raises BadConfig for a config that means nothing, UnsupportedModel for a method the model cannot use,
    BackendUnavailable for what this machine cannot run; the pipeline is then as it was.
    """
    found = anatomies(pipe)
    for name, goes in {type(a.denoiser).__name__: _goes(a) for a in found if not a.recognised}.items():
        warnings.warn(f"{name} is not described; fastdiff {goes}", stacklevel=2)
    handle = Accelerated(pipe, resolve_for(pipe, config, levers, found[0]))
    put(handle, found)
    return handle


def _goes(anatomy: Anatomy) -> str:
    return "treats it as a whole, and refuses what needs its inside" if anatomy.opaque else "goes by its structure"


def put(handle: Accelerated, found: list[Anatomy]) -> None:
    """Install a handle in the place of the one that is there; where that fails, the old one stays."""
    pipe = handle.pipe
    previous = vars(pipe).get(HANDLE)
    if previous is not None:
        previous.restore()
        if handle.config.text == previous.config.text:
            handle.embeddings = previous.embeddings  # other settings of the denoiser leave texts what they were
    _refuse_shared(pipe, found)
    try:
        handle.install(found)
    except BaseException:
        if previous is not None:
            previous.install(found)
        raise


def resolve_for(pipe: DiffusionPipeline, config: Source, levers: Mapping[str, Any], anatomy: Anatomy) -> Resolved:
    """Layers of `config` and keywords, merged for this pipeline's family."""
    layers = [*layers_of(config), *([("keyword", levers)] if levers else [])]
    return resolve(layers, anatomy.family, embedded_name(pipe))


def _refuse_shared(pipe: Any, found: list[Anatomy]) -> None:
    for anatomy in found:
        clock = getattr(current_forward(anatomy.denoiser), WATCHED, None)
        if clock is not None:
            fast = (
                "it has the same scheduler and is fast here too" if clock.hears(pipe) else "its calls here are computed"
            )
            raise UnsupportedModel(
                f"this {anatomy.component} is shared with a pipeline that is accelerated already; {fast}. To give it "
                "settings for this pipeline, restore() the other handle first"
            )


def restore(pipe: DiffusionPipeline) -> None:
    """Put a pipeline back exactly as it was before `accelerate`; does nothing if it is not accelerated."""
    handle = vars(pipe).get(HANDLE)
    if handle is not None:
        handle.restore()
