"""What accelerate and diffusers do to a model besides: devices, offload hooks, prepare, saving, all at once."""

from __future__ import annotations

import copy
import filecmp
from collections.abc import Iterator
from pathlib import Path

import accelerate
import diffusers
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DiffusionPipeline

import fastdiff
from fastdiff.errors import NotReversible
from tests import tiny
from tests.coverage.test_attachments import lora
from tests.coverage.test_features import adapted, image

DEEP = {"method": "deepcache", "interval": 3}
HALF = {"method": "ab_cache", "interval": 2, "warmup_steps": 1}
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_accelerator_left() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(True)


def hooked(pipe: DiffusionPipeline, kind: str, folder: Path) -> None:
    if kind == "cpu_offload":
        accelerate.cpu_offload(pipe.unet, execution_device=CPU)
    elif kind == "disk_offload":
        accelerate.disk_offload(pipe.unet, str(folder), execution_device=CPU)
    elif kind == "dispatch_model":
        accelerate.dispatch_model(pipe.unet, {"": "cpu"}, force_hooks=True)
    else:
        assert accelerate.Accelerator(cpu=True).prepare(pipe.unet) is pipe.unet


@pytest.mark.parametrize("kind", ["cpu_offload", "disk_offload", "dispatch_model", "prepare"])
def test_hooks_of_accelerate_change_no_picture(kind, tmp_path):
    reference = tiny.make("sd15")
    plain = tiny.run(reference, "sd15")
    fastdiff.accelerate(reference, cache=DEEP)
    expected = tiny.run(reference, "sd15")
    pipe = tiny.make("sd15")
    hooked(pipe, kind, tmp_path)
    with fastdiff.accelerate(pipe, cache=DEEP) as handle:
        assert torch.equal(tiny.run(pipe, "sd15"), expected) and handle.report.cached == 4
        assert not handle.report.notes
    assert torch.equal(tiny.run(pipe, "sd15"), plain)


def test_mixed_precision_of_accelerate_goes_first():
    """It wraps forward as a foreigner would: what is under it cannot be restored, and nothing is claimed to be lost."""
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    pipe = tiny.make("sd15")
    accelerator.prepare(pipe.unet)
    with fastdiff.accelerate(pipe, cache=DEEP) as handle:
        tiny.run(pipe, "sd15")
        assert handle.report.cached == 4
    pipe = tiny.make("sd15")
    handle = fastdiff.accelerate(pipe, cache=DEEP)
    inner = pipe.unet.forward
    accelerator.prepare(pipe.unet)
    tiny.run(pipe, "sd15")
    assert handle.report.cached == 4 and not handle.report.notes
    with pytest.raises(NotReversible, match=r"UNet2DConditionModel\.forward was changed"):
        handle.restore()
    pipe.unet.forward = inner
    handle.restore()


@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_moved_while_accelerated_it_is_what_it_is_when_moved_before(name):
    """A pipeline with encoders of its own: `to` moves all parts, and tests share those of the tiny ones."""
    moved, fresh = (copy.deepcopy(tiny.make(name)) for _ in range(2))
    fresh.to(torch.bfloat16)
    fastdiff.accelerate(fresh, cache=HALF)
    handle = fastdiff.accelerate(moved, cache=HALF)
    assert tiny.run(moved, name).dtype == torch.float32
    assert moved.to(torch.bfloat16) is moved and moved.to("cpu") is moved
    found = tiny.run(moved, name)
    assert found.dtype == torch.bfloat16 and handle.report.cached == 3
    assert torch.equal(found, tiny.run(fresh, name))


def test_saved_while_accelerated_it_is_the_plain_pipeline(tmp_path):
    """File by file. The picture is that of the plain pipeline saved and loaded: diffusers maps files into memory,
    where tensors are aligned to 8 bytes, and some processors then sum in another order than before saving."""
    pipe, pictures = tiny.make("sd15"), []
    pipe.save_pretrained(tmp_path / "plain")
    with fastdiff.accelerate(pipe, cache=DEEP):
        pipe.save_pretrained(tmp_path / "accelerated")
    names = sorted(path.relative_to(tmp_path / "plain") for path in (tmp_path / "plain").rglob("*") if path.is_file())
    assert filecmp.cmpfiles(tmp_path / "plain", tmp_path / "accelerated", names, shallow=False)[1:] == ([], [])
    assert len(names) == sum(path.is_file() for path in (tmp_path / "accelerated").rglob("*"))
    for name in ("plain", "accelerated"):
        again = diffusers.DiffusionPipeline.from_pretrained(tmp_path / name, safety_checker=None)
        again.set_progress_bar_config(disable=True)
        weights = again.unet.state_dict()
        assert all(torch.equal(weights[key], value) for key, value in pipe.unet.state_dict().items())
        pictures.append(tiny.run(again, "sd15"))
    assert torch.equal(*pictures)


def test_a_lora_an_ip_adapter_offloading_and_a_callback_all_at_once():
    seen: list[int] = []
    told = {"ip_adapter_image": image(1), **tiny.at_each_step("sd15", lambda _, step: seen.append(step))}

    def furnished(first: bool) -> DiffusionPipeline:
        pipe = adapted("sd15")
        if first:
            fastdiff.accelerate(pipe, cache=DEEP)
        pipe.load_lora_weights(lora(pipe))
        accelerate.cpu_offload(pipe.unet, execution_device=CPU)
        if not first:
            fastdiff.accelerate(pipe, cache=DEEP)
        return pipe

    one, other = furnished(first=True), furnished(first=False)
    assert torch.equal(tiny.run(one, "sd15", **told), tiny.run(other, "sd15", **told))
    assert seen == [*range(6), *range(6)]
    for pipe in (one, other):
        fastdiff.restore(pipe)
    assert torch.equal(tiny.run(one, "sd15", **told), tiny.run(other, "sd15", **told))
