"""All ranks of one accelerated pipeline: they meet, agree that they are alike, start alike, and end together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial, wraps
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastdiff.anatomy import Anatomy
from fastdiff.clock import Run, Step, StepClock
from fastdiff.errors import BadConfig, PeerLost
from fastdiff.patch import PatchSet, current_forward
from fastdiff.recorder import Recorder
from fastdiff.weights import absent

from .base import ParallelMethod
from .bus import Bus
from .mesh import card, join
from .methods.cfg import split_guidance
from .methods.parastep import Cycle
from .opaque import Opaque
from .portions import portion
from .shards import Shelf, shelve
from .shares import speeds
from .split import Forward
from .tokens import split_tokens
from .unet import split_decoder, split_unet


class Crew:
    """Installs a parallel method in three layers: inside the denoiser, around its blocks, around all of it.

    `alike` is what must be the same on all ranks, by name. Raises BadConfig where it is not, or where the processes do
    not fill the mesh.
    """

    def __init__(
        self, method: ParallelMethod, clock: StepClock, recorder: Recorder, device: torch.device,
        alike: Mapping[str, str],
    ) -> None:  # fmt: skip
        rank = join(method.devices, device, method.timeout)
        self.method, self.clock, self.recorder = method, clock, recorder
        self.bus = Bus(method.topology(dist.get_world_size(), rank), method.timeout, self._index)
        _compare({"kind of device": device.type, **alike}, self.bus)
        _apart(device, self.bus)
        self.bus.speeds = speeds(method.shares, self.bus.topology.group("patch"), device, self.bus.tell)
        self.bus.lost = self._lost
        self.cycle = Cycle(method, self.bus, clock, recorder) if self.bus.topology.step > 1 else None
        self.forget: list[Callable[[], None]] = []  # called when this rank goes on alone
        # branches of which some rank, and this one, was given other inputs than rank 0
        self._differ, self._differs, self.shelves = set[int](), set[int](), list[Shelf]()
        clock.on_start.append(self._start)
        clock.on_end.append(self._end)

    @property
    def agrees(self) -> Callable[[Tensor], Tensor]:
        """A reading of a cache, averaged over the ranks that have to decide alike."""
        return lambda reading: reading if self.bus.alone else self.bus.mean(reading, ("patch", "cfg"))

    def compiled(self, scope: str, patches: PatchSet) -> None:
        """Layers will be compiled. Raises BadConfig where what is around them would be, too."""
        if self.bus.topology.patch > 1 and scope == "denoiser":
            raise BadConfig(f"{self.method.method} cuts the picture inside the denoiser; set compile.scope = blocks")
        self.bus.opaque = Opaque(patches)

    def inside(self, anatomy: Anatomy, patches: PatchSet) -> Callable[[PatchSet], None]:
        """Patch what is inside a denoiser; what is returned patches what goes outside of a cache, around its blocks."""
        if self.bus.topology.patch > 1:
            if anatomy.family.kind != "unet":
                return split_tokens(self.method, anatomy, self.bus, self.clock, patches)
            split_unet(self.method, anatomy, self.bus, self.clock, patches)
        return lambda _: None

    def shelve(self, anatomy: Anatomy, cached: Sequence[nn.Module], patches: PatchSet) -> None:
        """Keep a part of the weights, where the config says so: around what is compiled, and inside of a cache."""
        self.shelves += shelve(self.method, anatomy, cached, self.bus, self.clock, patches)

    def decoder(self, vae: nn.Module | None, patches: PatchSet) -> None:
        """Decode by patches, where the config says so."""
        if self.method.vae and self.bus.topology.patch > 1:
            if vae is None:
                raise BadConfig("parallel.vae = true, but the pipeline has no VAE; set it to false")
            plain = current_forward(getattr(vae, "decoder", vae))
            split_decoder(self.method, vae, self.bus, patches)
            patches.wrap_forward(vae.decoder, lambda forward: self._decoded(forward, plain))

    def _decoded(self, forward: Forward, plain: Forward) -> Forward:
        @wraps(forward)
        def decoded(*args: Any, **kwargs: Any) -> Any:
            if self.bus.alone:
                return plain(*args, **kwargs)
            try:
                picture = forward(*args, **kwargs)
                self._report()  # with what decoding sent
                return picture
            except PeerLost as error:
                self._lost(error)
                return plain(*args, **kwargs)

        return decoded

    def outermost(self, anatomy: Anatomy, patches: PatchSet) -> None:
        if self.bus.topology.cfg > 1:
            split_guidance(anatomy, self.bus, self.clock, patches, self.recorder)
        if self.cycle is not None:
            self.cycle.attach(anatomy, patches)
        patches.wrap_forward(anatomy.denoiser, self._together)

    def _index(self) -> int | None:
        return self.clock.index if self.clock.run is not None else None

    def _start(self, run: Run) -> None:
        self.bus.device = run.device
        self.bus.begin()
        self._differ, self._differs = set(), set()
        warmup, ends = self.method.warmup_steps, getattr(self.method, "cooldown_steps", 0)
        if run.total <= warmup + ends and not self.method.fresh(warmup + 1):
            told = f"{warmup} and cooldown_steps = {ends} cover" if ends else f"{warmup} covers"
            self.recorder.note(f"parallel.warmup_steps = {told} all {run.total} steps: each of them waited")

    def _together(self, forward: Forward) -> Forward:
        """The denoiser's forward with rank 0's inputs, and with an end to it where a rank is lost."""

        @wraps(forward)
        def together(*args: Any, **kwargs: Any) -> Any:
            step = self.clock.now
            if step is None or self.bus.alone:
                return forward(*args, **kwargs)
            try:
                self.bus.look()
                if step.index == 0 or step.branch in self._differ:
                    args, kwargs = self._same(args, kwargs, step)
                output = forward(*args, **kwargs)
                if self.method.on_peer_loss == "local":
                    self.bus.arrived()  # who goes on alone goes on from what is true
                return output
            except PeerLost as error:
                self._lost(error)
            return forward(*args, **kwargs)  # once the error is gone, which holds what was made until then

        return together

    def _same(self, args: tuple, kwargs: dict, step: Step) -> tuple[tuple, dict]:
        """Rank 0's inputs; those of later steps too where a rank's own were different."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        told = [
            self.bus.broadcast("the inputs of rank 0", leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves
        ]
        self.bus.arrived()  # the host reads them
        if step.index == step.branch == 0:
            for get, put in _random_states(self.bus.device):
                put(self.bus.broadcast("the random state of rank 0", get()))
            if self.clock.before_step.count(self._latents) == 0:
                self.clock.before_step.append(self._latents)
        changed = any(isinstance(a, Tensor) and not torch.equal(a, b) for a, b in zip(leaves, told, strict=True))
        anywhere = self.bus.mean(torch.tensor(float(changed)), ("cfg", "step", "patch"))
        for branches, other in ((self._differ, anywhere > 0), (self._differs, changed)):
            (branches.add if other else branches.discard)(step.branch)
        return pytree.tree_unflatten(told, spec)

    def _latents(self, index: int, latents: Any) -> Any:
        """The first latents that the solver is given, and, where ranks differ, all of them, are rank 0's."""
        if isinstance(latents, Tensor) and (index == 0 or self._differ) and not self.bus.alone:
            try:
                told = self.bus.broadcast("the latents of rank 0", latents)
                self.bus.arrived()
                return told
            except PeerLost as error:
                self._lost(error)  # who goes on alone had the same ones
        return latents

    def _lost(self, error: PeerLost) -> None:
        """Raises, or makes this rank go on alone; the others learn of it in both cases."""
        self.bus.abort()
        if self.method.on_peer_loss == "raise":
            raise error
        if self._differs and self.clock.run is not None:  # what was drawn so far is rank 0's picture
            raise PeerLost(
                f"{error}; this rank was given other inputs than rank 0 and cannot finish rank 0's picture: give all "
                "ranks the same prompts and seed"
            )
        self.bus.alone = True
        for forget in self.forget:
            forget()
        self.recorder.note(f"{error}; this rank finished alone")

    def _end(self, run: Run) -> None:
        """Complete runs are compared and reported; a broken one is told to the others at once."""
        if self.bus.alone:
            return
        if self.clock.index < run.total:
            self._own()  # the others may be anywhere
            self.bus.abort()
            return
        try:
            self.bus.settle()
            self._report()
        except PeerLost as error:
            self._lost(error)

    def _own(self) -> dict[str, Any]:
        """What this rank sent, into the report."""
        report, traffic = self.recorder.report, self.bus.traffic
        own = {
            "rank": self.bus.topology.rank, "sent": dict(traffic.sent), "messages": dict(traffic.messages),
            "waited_seconds": round(traffic.waited, 4), "oldest": traffic.oldest,
            "step_seconds": [round(s, 4) for s in report.step_seconds],
        }  # fmt: skip
        report.ranks, report.spans = [own], list(traffic.spans)
        report.bytes_sent = sum(traffic.sent.values())
        return own

    def _report(self) -> None:
        self.bus.arrived()
        solved = self.clock.solved
        latents = solved[0] if isinstance(solved, tuple) else getattr(solved, "prev_sample", None)
        own = self._own()
        digest = float(latents.cpu().double().sum()) if isinstance(latents, Tensor) else 0.0
        everyone = self.bus.tell((own, digest))
        self.recorder.report.ranks = [one for one, _ in everyone]
        self.bus.speeds.learn(self.recorder.report.ranks, self.bus.topology.group("patch"))
        if any(d != digest and d == d for _, d in everyone):
            self.recorder.note("the ranks ended with different latents: give each the same generator seed")


def _compare(alike: Mapping[str, str], bus: Bus) -> None:
    told = bus.tell(dict(alike))
    for name, own in alike.items():
        other = next((rank for rank, theirs in enumerate(told) if theirs.get(name) != own), None)
        if other is not None:
            raise BadConfig(
                f"the ranks must have the same {name}: rank {bus.topology.rank} has {own:.100}, rank {other} "
                f"{told[other].get(name)!s:.100}"
            )


def _apart(device: torch.device, bus: Bus) -> None:
    """On GPUs each rank has one of its own, else NCCL does not begin."""
    own = card(device)
    same = [str(rank) for rank, other in enumerate(bus.tell(own)) if other == own] if own else []
    if len(same) > 1:
        raise BadConfig(
            f"ranks {' and '.join(same)} are on the same GPU, and each needs its own: call "
            "torch.cuda.set_device(LOCAL_RANK) before the pipeline is loaded, and start no more processes than GPUs"
        )


def _random_states(device: torch.device) -> Iterator[tuple[Callable[[], Tensor], Callable[[Tensor], None]]]:
    """What reads and what sets the states that noise comes from where nobody gives a generator."""
    yield torch.get_rng_state, torch.set_rng_state
    if device.type != "cpu":
        own = torch.get_device_module(device)
        yield partial(own.get_rng_state, device), partial(own.set_rng_state, device=device)


def fingerprint(module: nn.Module) -> str:
    """Names, shapes and, where they are here, a sample of the values of all weights, in a short number."""
    import zlib

    own, here = portion(module), absent(module) is None
    total = 0 if own is None else own.digest
    for name, tensor in module.state_dict().items() if own is None else ():
        if isinstance(tensor, Tensor):
            total = zlib.crc32(f"{name}{tuple(tensor.shape)}".encode(), total)
        if isinstance(tensor, Tensor) and here:
            some = tensor.detach().flatten()[:: max(1, tensor.numel() // 16)].cpu().double()
            total = zlib.crc32(some.numpy().tobytes(), total)
    return f"{total:08x}"
