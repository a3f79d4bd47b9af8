"""Models that ranks read their shares of; run by real processes, see ranks.py."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file, save_file

import fastdiff
from fastdiff.errors import FastdiffError
from fastdiff.parallel.shards import units
from fastdiff.pipelines import expected, quantized_files
from fastdiff.pipelines.families import anatomies
from fastdiff.pipelines.quantized_parts import align
from fastdiff.pipelines.room import Sizes
from fastdiff.weights import absent, nbytes
from tests import tiny

from .checks import digest, latents

SHARD = {"method": "patch", "shard": "blocks"}


def said(work: Callable[[], Any]) -> str:
    try:
        work()
    except FastdiffError as error:
        return f"{type(error).__name__}: {error}"
    return "went through"


@contextmanager
def saved(rank: int, make: Callable[[], Any], **files: Any) -> Iterator[Path]:
    """A pipeline's directory, which rank 0 writes and removes: libraries of others write there alone. It is made by a
    process of its own, so that nothing of it is left in the memory of ranks."""
    told = [tempfile.mkdtemp() if rank == 0 else None]
    dist.broadcast_object_list(told)
    folder = Path(str(told[0])) / "model"
    if rank == 0:
        child = os.fork()
        if not child:
            make().save_pretrained(folder, **files)
            os._exit(0)
        os.waitpid(child, 0)
    dist.barrier()
    try:
        yield folder
        dist.barrier()  # not after an error: the others would wait for this rank, and it for them
    finally:
        if rank == 0:
            shutil.rmtree(folder.parent, ignore_errors=True)


def tiny_one(name: str) -> Callable[[], Any]:
    return partial(tiny.make, name)


def pictures(rank: int, ranks: int) -> dict:
    """Those of a model that every rank has as a whole, to the bit; again after restoring, and with half precision."""
    found = {}
    for name, method, dtype in (("flux", "ring", torch.float32), ("sd15", "patch", torch.bfloat16)):
        settings = {"method": method, "shard": "blocks", "timeout": 600}
        with saved(rank, tiny_one(name), max_shard_size="50KB") as folder:
            whole, pipe = (fastdiff.load(folder, dtype=dtype, **more) for more in ({}, {"parallel": settings}))
        for one in (whole, pipe):
            align(one)
            one.set_progress_bar_config(disable=True)
        with fastdiff.accelerate(whole, parallel={"method": method, "timeout": 600}):
            wanted = latents(whole, name, 2)
        assert absent(tiny.denoiser(pipe)) == "are sharded: some are empty here"
        for _ in range(2):
            with fastdiff.accelerate(pipe, parallel=settings) as fast:
                assert torch.equal(latents(pipe, name, 2), wanted), name
                assert fast.report.ranks[rank]["sent"]["weights"] > 0
        assert absent(tiny.denoiser(pipe)) == "are sharded: some are empty here", "as it was loaded"
        found[name] = {"digest": digest(wanted.float())}
    return found


def packed(rank: int, ranks: int) -> dict:
    """A quantized directory, too: of each block a share is kept, and nothing else of it is here."""
    found = {}
    for name, scheme in (("flux", "w4a16"), ("sd15", "w8a16")):
        with saved(rank, tiny_one(name)) as folder:
            target = folder.with_name("quantized")
            if rank == 0:
                pipe = fastdiff.load(folder)
                fastdiff.quantize(pipe, {"quant": {"method": scheme, "speed": "smallest"}})
                quantized_files.save(pipe, target)
            dist.barrier()
            whole, pipe = (fastdiff.load(target, **more) for more in ({}, {"parallel": SHARD}))
        for one in (whole, pipe):
            one.set_progress_bar_config(disable=True)
        with fastdiff.accelerate(whole, parallel=SHARD) as fast:
            assert fast.crew is not None
            wanted, shares = latents(whole, name, 2), [len(kept.share) for kept in fast.crew.shelves[0].kept]
        own = vars(tiny.denoiser(pipe))["_fastdiff_portion"].kept
        assert [len(kept.share) for kept in own] == shares, "as those of a model that was here"
        tensors = [view.tensor for kept in own for view in kept.views]
        assert all(tensor.untyped_storage().nbytes() <= 8 for tensor in tensors)
        assert {"flux": torch.uint8, "sd15": torch.int8}[name] in {tensor.dtype for tensor in tensors}
        for _ in range(2):
            with fastdiff.accelerate(pipe, parallel=SHARD) as fast:
                assert torch.equal(latents(pipe, name, 2), wanted), name
        found[name] = {"digest": digest(wanted)}
    return found


def refused(rank: int, ranks: int) -> dict[str, str]:
    """What one share cannot be used for; and ranks that have read different models."""
    with saved(rank, tiny_one("sd3")) as folder:
        pipe = fastdiff.load(folder, parallel=SHARD)
        told = {
            "alone": said(lambda: latents(pipe, "sd3")),
            "whole": said(lambda: fastdiff.accelerate(pipe, parallel="patch")),
            "not parallel": said(lambda: fastdiff.accelerate(pipe, cache="first_block")),
            "quantized": said(lambda: fastdiff.accelerate(pipe, parallel=SHARD, quant="w8a16")),
            "three": said(lambda: fastdiff.load(folder, parallel={**SHARD, "devices": 3})),
        }
        with tempfile.TemporaryDirectory() as copied:
            shutil.copytree(folder, copied, dirs_exist_ok=True)
            file = Path(copied) / "transformer" / "diffusion_pytorch_model.safetensors"
            if rank:  # a number of a block: the shapes are the same
                weights = load_file(file)
                next(t for name, t in weights.items() if "blocks.1" in name and t.ndim == 2)[0, 0] += 1
                save_file(weights, file)
            other = fastdiff.load(copied, parallel=SHARD)
        told["different"] = said(lambda: fastdiff.accelerate(other, parallel=SHARD))
    return told


def whole(rank: int, ranks: int) -> dict[str, Any]:
    """What cannot be read by shares is read whole, with a warning; the picture is the same."""
    told = {}
    with saved(rank, tiny_one("sd3")) as folder:
        if rank == 0:
            shutil.copytree(folder, folder.with_name("broken"))
            config = folder.with_name("broken") / "transformer" / "config.json"
            config.write_text(json.dumps(json.loads(config.read_text()) | {"num_attention_heads": "many"}))
        dist.barrier()
        for name, more in (("model", {"quant": "w8a16"}), ("broken", {})):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                load = partial(fastdiff.load, folder.with_name(name), parallel=SHARD, **more)
                result = said(load)
            told[name] = [str(one.message) for one in caught if "each rank" in str(one.message)] + [result[:20]]
    return told


def foretold(rank: int, ranks: int) -> list[list[str]]:
    """What is said, and refused, of plain ranks, shares and halves of guidance: where memory is plenty, where weights
    alone fill it, and where what no two ranks have in common does not fit."""
    found = []
    with saved(rank, tiny_one("sd3")) as folder:
        before, sizes = expected.memory.free, Sizes.of(folder, torch.float32)
        for name, shard in (("patch", None), ("patch", "blocks"), ("cfg", None)):
            method: Any = fastdiff.Config(parallel={"method": name, "shard": shard}).parallel
            room = sizes.room(method, ranks)
            for have in (100 * room.peak, 1.05 * room.peak, 0.99 * (room.peak - room.mapped / 2)):
                expected.memory.free = partial(_free, have * ranks)  # type: ignore[assignment]
                told: list[str] = []
                refused = said(lambda method=method, told=told: told.extend(_expected(folder, method)))
                found.append([*told, refused])
        expected.memory.free = before
    return found


def _free(count: float, _: torch.device) -> float:
    return count


def _expected(folder: Path, method: Any) -> list[str]:
    return expected.expect(str(folder), method, None, quantizes=False)


def large() -> Any:
    """About 420 MB in 21 blocks, with the tiny text encoders and VAE."""
    pipe = tiny.make("flux")
    pipe.transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=20, attention_head_dim=32,
        num_attention_heads=16, joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(8, 12, 12),
    ).eval()  # fmt: skip
    return pipe


def memory(rank: int, ranks: int) -> dict[str, int]:
    """The most that was resident beyond what was before, of loading and of drawing; each of both ways."""
    _drawn(tiny.make("flux"))  # all that libraries make once
    found: dict[str, int] = {}
    with saved(rank, large, max_shard_size="80MB") as folder:
        for way, settings in (("shares", SHARD), ("whole", None)):
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the most is what is now
            before = _status("VmRSS")
            pipe: Any = fastdiff.load(folder, parallel=settings)
            pipe.set_progress_bar_config(disable=True)
            found[f"{way}, loading"] = _status("VmHWM") - before
            sizes = [nbytes(block) for block in units(anatomies(pipe)[0])]
            found |= {"weights": nbytes(pipe.transformer), "blocks": sum(sizes), "largest": max(sizes)}
            _drawn(pipe)
            found[f"{way}, drawing"] = _status("VmHWM") - before
            del pipe
    return found


def _drawn(pipe: Any) -> None:
    with fastdiff.accelerate(pipe, parallel=SHARD):
        latents(pipe, "flux", 2)


def _status(name: str) -> int:
    line = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    assert line is not None
    return int(line[1]) * 1024
