"""Times of a device that runs behind the host: simulated, as no such device is needed to see what is asked of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastdiff import recorder as recording
from fastdiff import timing
from fastdiff.bench import probe as probing
from fastdiff.bench.probe import Probe
from fastdiff.recorder import Recorder
from fastdiff.run import Run
from fastdiff.timing import Leash, Moments


class Device:
    """Work is queued: `launch` costs the host `host` seconds, the device `seconds`. An event is when its turn comes."""

    def __init__(self) -> None:
        self.host = self.done = 0.0
        self.waits = 0

    def launch(self, host: float, seconds: float) -> None:
        self.host += host
        self.done = max(self.done, self.host) + seconds

    def event(self, device: Any, enable_timing: bool) -> Any:
        assert enable_timing
        made = SimpleNamespace(at=None)
        made.record = lambda _stream: setattr(made, "at", self.done)
        made.synchronize = lambda: setattr(self, "waits", self.waits + 1)
        made.elapsed_time = lambda later: 1e3 * (later.at - made.at)
        return made


@pytest.fixture
def device(monkeypatch: Any) -> Device:
    simulated = Device()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: simulated.host)
    monkeypatch.setattr(timing.torch, "Event", simulated.event)
    monkeypatch.setattr(timing.torch.accelerator, "current_stream", lambda device: None)
    return simulated


def test_a_cpu_s_times_are_the_host_s(device):
    moments = Moments(torch.device("cpu"))
    device.launch(0.5, 0.0)
    moments.mark()
    assert moments.seconds() == moments.host_seconds() == [0.5] and device.waits == 0


@pytest.mark.parametrize("kind", ["cuda", "xpu", "mps"])
def test_a_step_takes_what_the_device_takes_not_what_launching_takes(device, kind):
    moments = Moments(torch.device(kind))
    for seconds in (1.0, 2.0, 0.5):
        device.launch(0.01, seconds)
        moments.mark()
    assert device.waits == 0 and moments.host_seconds() == pytest.approx([0.01] * 3)
    assert moments.seconds() == pytest.approx([1.01, 2.0, 0.5]) and device.waits == 1


def test_the_report_says_both_and_waits_once_a_run(device, monkeypatch):
    names = ("on_start", "on_end", "on_tick", "on_call", "on_return", "on_note")
    monkeypatch.setattr(recording, "peak_memory_mb", lambda device: 1.0)
    monkeypatch.setattr(recording.torch.cuda, "reset_peak_memory_stats", lambda device: None)
    made = Recorder(SimpleNamespace(**{name: [] for name in names}))
    run = Run(1, (2.0, 1.0), (2.0, 1.0), False, device=torch.device("cuda"))
    made._start(run)
    for index in range(2):
        device.launch(0.1, 1.0)
        made._tick(index)
        assert made.report.steps == index + 1 and device.waits == 0
    made._end(run)
    assert device.waits == 1 and made.report.seconds == pytest.approx(2.1)
    assert made.report.to_dict()["host_seconds"] == pytest.approx(0.2) and "(0.20 s on the host)" in str(made.report)


@pytest.mark.parametrize("kind", ["cuda", "xpu", "mps"])
def test_a_benchmark_has_the_device_s_times(device, kind, monkeypatch):
    """Of a pipeline that offloading has parked on the CPU, too."""
    waited: list[torch.device] = []

    def synchronize(of: torch.device) -> None:
        waited.append(of)
        device.host = max(device.host, device.done)

    monkeypatch.setattr(timing.torch.accelerator, "synchronize", synchronize)
    monkeypatch.setattr(probing.torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(probing.torch.cuda, "max_memory_allocated", lambda device: 5e6)
    where, unet = torch.device(kind, 1), torch.nn.Identity()
    monkeypatch.setattr(probing, "denoisers", lambda pipe: {"unet": unet})
    unet.register_forward_pre_hook(lambda *_: device.launch(0.01, 1.0))
    with Probe(SimpleNamespace(device=torch.device("cpu"), _execution_device=where)) as found:
        for _ in range(3):
            unet(torch.ones(1))
    assert waited == [where, where]
    assert found.seconds == pytest.approx(3.01) and found.denoising_seconds == pytest.approx(2.0, abs=0.02)
    assert kind != "cuda" or found.peak_memory_mb == 5.0


def test_a_leash_lets_the_host_be_one_step_ahead(device, monkeypatch):
    """As a server has to, between whose steps something more urgent may come."""
    waited: list[float] = []
    event = device.event

    def marked(where: Any, enable_timing: bool) -> Any:
        made = event(where, enable_timing)
        made.synchronize = lambda: waited.append(made.at)
        return made

    monkeypatch.setattr(timing.torch, "Event", marked)
    leash = Leash()
    for _ in range(4):
        device.launch(0.0, 1.0)
        leash.step(torch.device("xpu"))
    assert waited == [1.0, 2.0, 3.0], "each time for the step before the one that was given last"
    Leash().step(torch.device("cpu"))
