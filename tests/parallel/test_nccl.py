"""Every parallel method under what NCCL asks of ranks (fake_nccl.py): the same picture, nothing waits, nobody hangs."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastdiff
from fastdiff.errors import BadConfig, PeerLost
from fastdiff.parallel import watch
from fastdiff.parallel.bus import Bus
from fastdiff.parallel.layers import _moments
from fastdiff.parallel.mesh import Topology
from fastdiff.threads import survivable
from tests import tiny
from tests.device.cards import DEVICE, Card, OnCard, Stuck, TooEarly, WrongDevice

from .checks import moved
from .fake_nccl import Deadlock, FakeDist, Refused, World, install

STEPS = 3
SMALL: dict[str, dict[str, Any]] = {"sd15": {"height": 128}}  # a part for each of two ranks
LATE, CYCLE = {"warmup_steps": 0}, {"warmup_steps": 1}


def slow(*case: Any) -> Any:
    return pytest.param(*case, marks=pytest.mark.slow)


EXACT = [
    ("sd15", "patch"), slow("sd3", "patch"), ("sd3", "ulysses"), ("flux", "cfg"), slow("sd15", "cfg"),
    slow("flux", "patch"), slow("sd3", "ring"), ("sd3", "token_ring"), slow("flux", "ring"), slow("sd15", "ring"),
    slow("wan", "patch"), slow("pixart", "ulysses"),
]  # fmt: skip
NEAR = [
    ("sd15", "distrifusion", LATE), ("sd3", "pcpp", LATE | {"codec": "residual"}), slow("sd3", "parastep", CYCLE),
    ("sd3", "pipefusion", {"patches": 3}), slow("flux", "pipefusion", {"patches": 3}),
    slow("sd3", "distrifusion", LATE | {"codec": "int8"}), slow("sd15", "pcpp", LATE), slow("sd15", "parastep", CYCLE),
]  # fmt: skip


def pipeline(name: str, card: Card | None = None, dtype: torch.dtype = torch.float64) -> Any:
    """A pipeline of its own, on a card where there is one."""
    pipe = tiny.make(name)
    for part, module in pipe.components.items():
        if isinstance(module, nn.Module):
            own = copy.deepcopy(module).to(dtype)
            setattr(pipe, part, own)
            if card is not None:
                card.put(own)
    return pipe


def latents(pipe: Any, name: str, **changes: Any) -> Tensor:
    """Without a callback in it, a run's pipeline reads nothing that its first step has not read."""
    return pipe(**(tiny.arguments(name, STEPS) | SMALL.get(name, {}) | changes))[0]


def ranks_draw(
    name: str, parallel: dict[str, Any], monkeypatch: Any, ranks: int = 2, cards: bool = True,
    dtype: torch.dtype = torch.float64, **changes: Any,
) -> list[Any]:  # fmt: skip
    """Latents and handle of each rank, on cards over NCCL or on CPUs over gloo."""
    world = World(ranks)
    pipes = [pipeline(name, card if cards else None, dtype) for card in world.cards]
    with monkeypatch.context() as patch:
        install(world, patch)

        def work(rank: int) -> Any:
            handle = fastdiff.accelerate(pipes[rank], parallel=parallel)
            found = latents(pipes[rank], name, **changes)
            return found.cpu(), handle.report, world

        said = world.run(work)
    wrong = sorted((one for one in said if isinstance(one, BaseException)), key=lambda one: isinstance(one, PeerLost))
    if wrong:
        raise wrong[0]  # the others have lost it
    return said


@cache
def alone(name: str) -> Tensor:
    with torch.no_grad():
        return latents(pipeline(name), name)


@pytest.mark.parametrize(("name", "method"), EXACT)
def test_exact_methods_draw_the_picture_of_one_device(name, method, monkeypatch) -> None:
    (found, report, world), (other, *_) = ranks_draw(name, {"method": method}, monkeypatch)
    assert moved(found, alone(name)) < 1e-12 and torch.equal(found, other)
    assert world.launched[0] and len({group for group, _ in world.launched[0]}) == 1, "one communicator, one order"
    assert report.notes == []


def test_shares_of_weights_are_gathered_in_the_order_of_the_device(monkeypatch) -> None:
    for asks in ({"method": "patch", "shard": "blocks"}, {"method": "pipefusion", "patches": 1}):
        found, report, world = ranks_draw("sd3", asks, monkeypatch)[0]
        assert moved(found, alone("sd3")) < 1e-12 and report.notes == []
        assert report.ranks[0]["sent"]["stage" if "patches" in asks else "weights"] > 0
        assert len({group for group, _ in world.launched[0]}) == 1


@pytest.mark.parametrize(("name", "method", "more"), NEAR)
def test_other_methods_draw_the_picture_that_they_draw_over_gloo(name, method, more, monkeypatch) -> None:
    parallel = {"method": method, **more}
    found, report, _ = ranks_draw(name, parallel, monkeypatch)[0]
    wanted, on_host, world = ranks_draw(name, parallel, monkeypatch, cards=False)[0]
    assert not world.launched[0] and moved(found, wanted) < 1e-9 and moved(found, alone(name)) > 1e-9
    assert [one["sent"] for one in report.ranks] == [one["sent"] for one in on_host.ranks]
    assert [one["oldest"] for one in report.ranks] == [one["oldest"] for one in on_host.ranks]
    told, there = ([(span.kind, span.layer, span.step) for span in one.spans] for one in (on_host, report))
    assert there == told and {kind for kind, *_ in there} == {"transfer", "wait"}, "the timeline, by the GPU's marks"
    assert all(span.start <= span.end for span in report.spans)


@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [
        (3, {"method": "pcpp", **LATE}),
        (3, {"method": "token_ring"}),
        slow(4, {"method": "patch", "cfg": 2}),
        slow(4, {"method": "ring", "ulysses": 2}),
    ],
)
def test_more_ranks(ranks, parallel, monkeypatch) -> None:
    found = ranks_draw("sd3", parallel, monkeypatch, ranks)
    assert all(torch.equal(one, found[0][0]) for one, *_ in found)
    if parallel["method"] != "pcpp":
        assert moved(found[0][0], alone("sd3")) < 1e-12


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("flux", "patch"),
        ("sd3", "token_ring"),
        slow("sd3", "ring"),
        slow("sd3", "distrifusion"),
        slow("sd3", "parastep"),
    ],
)
def test_no_host_waits_for_its_gpu_in_a_step(name, method, monkeypatch) -> None:
    """The first step looks: at rank 0's inputs, and at Flux' list of places. The end of the run does once more."""
    world, reads = World(2), [list[int](), list[int]()]
    pipes = [pipeline(name, card) for card in world.cards]
    install(world, monkeypatch)

    def counts(pipe: Any, step: int, timestep: Any, given: dict) -> dict:
        reads[world.rank].append(world.cards[world.rank].reads)
        return given

    def work(rank: int) -> None:
        with fastdiff.accelerate(pipes[rank], parallel={"method": method}):
            latents(pipes[rank], name, callback_on_step_end=counts)

    assert world.run(work) == [None, None]
    assert all(first > 0 and [first, first, first + 1] == [first, *later] for first, *later in reads), reads


def test_groups_are_normalized_in_half_precision(monkeypatch) -> None:
    """On a GPU the layer reads what it is given, and not a copy of it in float32."""
    once, half = {"num_inference_steps": 1}, torch.bfloat16
    found, *_ = ranks_draw("sd15", {"method": "patch"}, monkeypatch, dtype=half, **once)[0]
    with torch.no_grad():
        plain, exact = (latents(pipeline("sd15", dtype=dtype), "sd15", **once) for dtype in (half, torch.float64))
    assert found.dtype == torch.bfloat16
    assert moved(found.double(), exact) < 1.5 * moved(plain.double(), exact)


def goes_at(name: str, how: str, monkeypatch: Any, **parallel: Any) -> list[Any]:
    """Rank 1 hangs, dies or raises after step 1 of 4: what became of the ranks."""
    world = World(2)
    pipes = [pipeline(name, card) for card in world.cards]
    with monkeypatch.context() as patch:
        install(world, patch)

        def goes(pipe: Any, step: int, timestep: Any, given: dict) -> dict:
            if step == 1 and world.rank == 1:
                if how == "raises":
                    raise KeyError("a mistake in a callback")
                world.goes(how)
            return given

        def work(rank: int) -> Any:
            handle = fastdiff.accelerate(pipes[rank], parallel=parallel | {"timeout": 6.0})
            found = latents(pipes[rank], name, callback_on_step_end=goes)
            return found.cpu(), handle.report

        return world.run(work)


HOW = {"hangs": "rank 1 did not answer", "has died": "rank 1 broke off or died", "raises": "rank 1 broke off or died"}


@pytest.mark.parametrize(
    ("name", "how", "method"),
    [
        ("sd3", "hangs", "cfg"),
        ("sd3", "hangs", "distrifusion"),
        ("sd3", "has died", "ulysses"),
        ("sd3", "hangs", "ring"),
        ("sd3", "raises", "cfg"),
    ],
)
def test_a_lost_rank_is_named_with_layer_and_step(name, how, method, monkeypatch) -> None:
    left = goes_at(name, how, monkeypatch, method=method)[0]
    assert isinstance(left, PeerLost), left
    text = str(left)
    assert HOW[how] in text and "rank 0 waited" in text and "for " in text
    assert "at step 2" in text, text


@pytest.mark.parametrize(("name", "method"), [("sd3", "patch"), ("sd3", "parastep"), ("flux", "cfg")])
def test_who_is_left_goes_on_from_what_is_true(name, method, monkeypatch) -> None:
    """What a device computes from values that never came must not leave the denoiser."""
    found, report = goes_at(name, "hangs", monkeypatch, method=method, on_peer_loss="local")[0]
    assert moved(found, alone(name)) < 1e-12
    assert any("this rank finished alone" in note for note in report.notes)


def bus_of(world: World, rank: int, timeout: float = 6.0) -> Bus:
    bus = Bus(Topology(cfg=1, step=1, patch=world.size, rank=rank), timeout, lambda: 0)
    bus.device = DEVICE
    bus.begin()
    world.ends.append(bus._watch.stop)
    bus.broadcast("hello", torch.zeros(1, device=DEVICE))
    return bus


def broken(work: Callable[[World, int], Any], monkeypatch: Any, ranks: int = 2, **more: Any) -> list[Any]:
    world = World(ranks, **more)
    with monkeypatch.context() as patch:
        install(world, patch)
        try:
            return world.run(lambda rank: work(world, rank))
        finally:
            for end in world.ends:
                end()


def first(said: list[Any], kind: type[BaseException]) -> str:
    found = [str(one) for one in said if isinstance(one, kind)]
    assert found, said
    return found[0]


def blocks(world: World, rank: int) -> None:
    bus = bus_of(world, rank)
    (pending,) = bus.post("kv", "layer", {1 - rank: torch.ones(4, dtype=torch.uint8, device=DEVICE)}, {1 - rank: 4})
    pending.work.wait(bus._limit())


def reads_at_once(world: World, rank: int) -> Tensor:
    bus = bus_of(world, rank)
    (pending,) = bus.post("kv", "layer", {1 - rank: torch.ones(4, dtype=torch.uint8, device=DEVICE)}, {1 - rank: 4})
    return pending.buffer + 1


def sends_from_the_host(world: World, rank: int) -> None:
    FakeDist(world).batch_isend_irecv(
        [
            FakeDist(world).P2POp(
                "send", torch.zeros(4, dtype=torch.uint8), 1 - rank, bus_of(world, rank)._group("device")
            )
        ]
    )


def changes_what_it_sends(world: World, rank: int) -> None:
    bus, bytes_ = bus_of(world, rank), torch.ones(4, dtype=torch.uint8, device=DEVICE)
    pending = bus.post("kv", "layer", {1 - rank: bytes_}, {1 - rank: 4})
    bytes_ += 1
    bus.wait(pending)


def two_orders(world: World, rank: int) -> None:
    """A second communicator, which the ranks enter before and after the first."""
    bus, dist = bus_of(world, rank), FakeDist(world)
    other = dist.new_group(bus._limit(), "nccl")
    dist.broadcast(torch.zeros(1, device=DEVICE), 0, other, async_op=True).wait()
    works = []
    for group in (bus._group("device"), other)[:: 1 if rank else -1]:
        bytes_ = [torch.ones(4, dtype=torch.uint8, device=DEVICE) for _ in range(2)]
        works += dist.batch_isend_irecv(
            [dist.P2POp(dist.isend, bytes_[0], 1 - rank, group), dist.P2POp(dist.irecv, bytes_[1], 1 - rank, group)]
        )
    for work in works:
        work.wait()


def begins_with_a_pair(world: World, rank: int) -> None:
    bus = Bus(Topology(cfg=1, step=1, patch=3, rank=rank), 6.0)
    bus.device = DEVICE
    bus.begin()
    world.ends.append(bus._watch.stop)
    if rank < 2:
        bus.swap("kv", "layer", {1 - rank: torch.ones(4, dtype=torch.uint8, device=DEVICE)}, {1 - rank: 4})


def reads_of_a_lost_rank(world: World, rank: int) -> Any:
    """Without a watch the host would stop at the first value that it reads."""
    bus = bus_of(world, rank)
    bus._watch.stop()
    if rank == 1:
        world.goes("hangs")
    got = bus.swap("kv", "layer", {1: torch.ones(4, dtype=torch.uint8, device=DEVICE)}, {1: 4})
    return got[1].tolist()


def destroys(world: World, rank: int) -> None:
    bus = bus_of(world, rank)
    if rank == 1:
        world.goes("hangs")
    bus.swap("kv", "layer", {1: torch.ones(4, dtype=torch.uint8, device=DEVICE)}, {1: 4})
    FakeDist(world).destroy_process_group(bus._group("device"))


def mixes(world: World, rank: int) -> Tensor:
    return torch.ones(2, device=DEVICE) + torch.ones(2)


@pytest.mark.parametrize(
    ("work", "kind", "reason"),
    [
        (blocks, Refused, "blocks the host"),
        (reads_at_once, TooEarly, "nothing told the GPU to wait"),
        (sends_from_the_host, WrongDevice, "not on its GPU"),
        (changes_what_it_sends, Refused, "was changed before it had left"),
        (two_orders, Deadlock, "in two orders: rank 0 is in communicator 2 with rank 1"),
        (reads_of_a_lost_rank, Stuck, "waits for rank 1, which hangs"),
        (destroys, Stuck, "abort it"),
        (mixes, WrongDevice, "on the CPU and on a GPU"),
    ],
)
def test_what_nccl_does_not_bear_is_told(work, kind, reason, monkeypatch) -> None:
    assert reason in first(broken(work, monkeypatch, patience=0.3), kind)


def test_a_communicator_begins_with_all_its_ranks(monkeypatch) -> None:
    assert "all its ranks" in first(broken(begins_with_a_pair, monkeypatch, 3), Refused)


def test_a_host_that_reads_is_set_free(monkeypatch) -> None:
    """The thread that looks at the GPU finds the lost rank while the host stands in a read."""

    def reads(world: World, rank: int) -> Any:
        bus = bus_of(world, rank)
        if rank == 1:
            world.goes("hangs")
        got = bus.swap("kv", "block 3 attn", {1: torch.ones(4, dtype=torch.uint8, device=DEVICE)}, {1: 4})
        got[1].tolist()
        bus.look()

    text = first(broken(reads, monkeypatch), PeerLost)
    assert "rank 1 did not answer" in text and "for block 3 attn at step 0" in text


def test_a_device_that_computes_for_long_is_no_loss(monkeypatch) -> None:
    """The clock of a wait begins when the device comes to it, not when it was queued."""
    bus, here = Bus(Topology(cfg=1, step=1, patch=2, rank=0), 1.0), [False, False]
    marks = [SimpleNamespace(query=lambda k=k: here[k], elapsed_time=lambda other: 5.0) for k in (0, 1)]
    times = iter(range(0, 10_000, 10))
    monkeypatch.setattr(watch, "moment", lambda device: marks.pop(0))
    monkeypatch.setattr(watch, "time", SimpleNamespace(perf_counter=lambda: float(next(times)), sleep=time.sleep))
    monkeypatch.setattr(watch, "PACE", 0.001)
    bus._watch.gone = lambda peers: False
    bus._watch.wait([SimpleNamespace(wait=lambda: None)], DEVICE, {1}, "layer", 7)
    while next(times) < 500:
        time.sleep(0.001)
    bus.look()
    here[0] = True
    with pytest.raises(PeerLost, match=r"rank 1 did not answer: .* for layer at step 7"):
        bus.arrived()
    assert bus._watch.waited > 1.0


def test_ranks_on_one_gpu_are_refused(monkeypatch) -> None:
    card = Card(0)
    world = World(2, [card, card])
    pipes = [pipeline("sd3", card) for _ in range(2)]
    install(world, monkeypatch)
    for said in world.run(lambda rank: fastdiff.accelerate(pipes[rank], parallel="patch")):
        assert isinstance(said, BadConfig) and "ranks 0 and 1 are on the same GPU" in str(said)


def test_noise_of_each_gpu_is_that_of_the_first(monkeypatch) -> None:
    world = World(2)
    pipes = [pipeline("sd3", card) for card in world.cards]
    install(world, monkeypatch)

    def work(rank: int) -> list[float]:
        with fastdiff.accelerate(pipes[rank], parallel="cfg"):
            latents(pipes[rank], "sd3", num_inference_steps=1)
        return torch.rand(3, generator=world.cards[rank].generator).tolist()

    one, other = world.run(work)
    assert one == other


def test_the_process_survives_errors_of_nccl_and_the_environment_stays() -> None:
    unset: dict[str, str] = {}
    with survivable(unset):
        assert unset == {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"}
    assert unset == {}
    own = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "3"}
    with survivable(own):
        pass
    assert own == {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "3"}


def test_statistics_of_a_group_are_the_same_on_a_gpu() -> None:
    x = 3 + 5 * torch.randn(2, 8, 6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad(), Card(0) as card:
        there = [value.inner for value in _moments(OnCard(x, card), 4)]
    for found, wanted in zip(there, _moments(x, 4), strict=True):
        assert moved(found, wanted) < 1e-14
