"""Blocks that stay in the memory of the host, and come up one ahead of the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastdiff
from fastdiff.errors import BadConfig, NotReversible, UnsupportedModel
from fastdiff.parallel.host import Host
from fastdiff.parallel.shards import Shelf, units
from fastdiff.patch import PatchSet
from fastdiff.pipelines.families import anatomies
from fastdiff.weights import nbytes
from tests import tiny
from tests.state import differences, snapshot

SKIPS: dict[str, Any] = {"method": "first_block", "threshold": 1e9, "max_consecutive_cached": 1}


@pytest.mark.parametrize("name", ["flux", "sd15", "wan"])
def test_a_streamed_pipeline_draws_the_same_and_is_itself_again(name: str) -> None:
    pipe = tiny.make(name)
    wanted, root = tiny.run(pipe, name, steps=3), tiny.denoiser(pipe)
    before, values = snapshot(pipe), {k: v.clone() for k, v in root.state_dict().items()}
    with fastdiff.stream(pipe) as streamed:
        here = sum(t.untyped_storage().nbytes() for t in (*root.parameters(), *root.buffers()))
        assert here < streamed.held < nbytes(root)
        places = {t.data_ptr() for block in units(anatomies(pipe)[0]) for t in block.parameters()}
        assert len(places) == len(units(anatomies(pipe)[0])), "a number for each block, not one for each weight"
        assert torch.equal(tiny.run(pipe, name, steps=3), wanted)
        with pytest.raises(UnsupportedModel, match="are sharded: some are empty here"):
            fastdiff.accelerate(pipe, quant="w8a16")
    left = [text for text in differences(before, snapshot(pipe)) if "scheduler" not in text]
    assert left == [] and all(torch.equal(v, values[k]) for k, v in root.state_dict().items())
    assert torch.equal(tiny.run(pipe, name, steps=3), wanted)


def test_what_a_cache_skips_is_not_copied_and_restoring_goes_backwards() -> None:
    pipe = tiny.make("flux")
    with fastdiff.accelerate(pipe, cache=SKIPS) as fast:
        wanted, skipped = tiny.run(pipe, "flux"), fast.report.cached
    (anatomy,) = anatomies(pipe)
    shelf = Shelf(units(anatomy), anatomy.denoiser, Host(torch.device("cpu")), torch.device("cpu"))
    with PatchSet() as patches:
        shelf.install(patches)
        with fastdiff.accelerate(pipe, cache=SKIPS) as fast:
            assert torch.equal(tiny.run(pipe, "flux"), wanted) and fast.report.cached == skipped
        computed = 2 * (6 - skipped) * 5 + 2 * skipped
        assert shelf.fetched == computed + 1, "two halves of guidance, five blocks, or the first alone"
        patches.restore()
    streamed = fastdiff.stream(pipe)
    fast = fastdiff.accelerate(pipe, cache=SKIPS)
    with pytest.raises(NotReversible):
        streamed.restore()
    fast.restore()
    streamed.restore()
    assert torch.equal(tiny.run(tiny.make("flux"), "flux"), tiny.run(pipe, "flux"))


class Line:
    """A stream of work that notes what it is told."""

    def __init__(self, name: str, said: list[str]) -> None:
        self.name, self.said = name, said

    def wait_stream(self, other: Line) -> None:
        self.said.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event: str) -> None:
        self.said.append(f"{self.name} waits for {event}")

    def record_event(self) -> str:
        self.said.append(f"{self.name} records")
        return "the copy"

    def __enter__(self) -> None:
        self.said.append(f"{self.name} copies")

    def __exit__(self, *_: object) -> None:
        pass


def test_copies_are_ordered_between_two_lines_of_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is not written to before what was in it is used up, nor read before it is written."""
    pipe, said = tiny.make("sd3"), list[str]()
    (anatomy,) = anatomies(pipe)
    host, main = Host(torch.device("cpu")), Line("computing", said)
    shelf = Shelf(units(anatomy), anatomy.denoiser, host, torch.device("cpu"))
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: main)
    wanted = tiny.run(pipe, "sd3", steps=1)
    with PatchSet() as patches:
        shelf.install(patches)
        host.side = Line("copying", said)  # type: ignore[assignment]
        assert torch.equal(tiny.run(pipe, "sd3", steps=1), wanted)
        one = ["copying waits for computing", "copying copies", "copying records"]
        assert said == [*one, *(["computing waits for the copy", *one] * 4)], "the next before the present one runs"
        patches.restore()


def test_what_is_on_the_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny.make("sd3")
    monkeypatch.setattr(type(pipe), "device", torch.device("cuda"))
    with pytest.raises(BadConfig, match="is on cuda already: load it on the CPU"):
        fastdiff.stream(pipe, "cuda")
