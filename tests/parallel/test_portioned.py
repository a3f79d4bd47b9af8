"""Ranks that read their shares of a model; what is checked by real processes is in portioned.py."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import fastdiff
from fastdiff import memory
from fastdiff.errors import BackendUnavailable, BadConfig
from fastdiff.parallel.bus import Bus
from fastdiff.parallel.mesh import Topology
from fastdiff.parallel.portions import Portion
from fastdiff.parallel.shards import Peers, Shelf, units
from fastdiff.pipelines import portioned as reading
from fastdiff.pipelines.expected import foresee
from fastdiff.pipelines.families import anatomies
from fastdiff.pipelines.room import Sizes
from fastdiff.weights import nbytes
from tests import tiny

from . import portioned
from .asked import Asked

CHECKS = Asked(portioned, {2: ("pictures", "packed", "refused", "whole", "foretold", "memory")}, {2: ("memory",)})
pytestmark = pytest.mark.xdist_group("shards")
CPU = torch.device("cpu")


@pytest.mark.parametrize(("ranks", "name"), CHECKS.cases, ids=str)
def test_check(ranks: int, name: str) -> None:
    CHECKS.agree(ranks, name)


def test_all_checks_run() -> None:
    CHECKS.all_run()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the system says what is resident")
def test_no_rank_ever_has_the_whole_model() -> None:
    """Bytes are counted; the system says little more. Of what is freed glibc keeps up to 64 MiB to give out again."""
    slack = 70e6
    for found in CHECKS.told(2, "memory"):
        rest, here = found["weights"] - found["blocks"], 2 * found["largest"]
        kept = rest + found["blocks"] / 2
        assert kept + here + slack < 0.95 * found["weights"], "the model is large enough to tell"
        assert found["shares, loading"] < kept + slack
        assert 0.9 * kept < found["shares, drawing"] < kept + here + slack
        assert found["whole, drawing"] > 0.95 * found["weights"]


def test_a_share_alone_is_refused_with_what_to_do() -> None:
    for found in CHECKS.told(2, "refused"):
        for case in ("alone", "whole", "not parallel"):
            assert "accelerate its pipeline with parallel.shard = blocks, on all ranks" in found[case], case
        assert "some are empty here" in found["quantized"]
        assert found["three"].startswith("BadConfig: parallel.devices = 3, but 2 processes run")
        assert found["different"].startswith("BadConfig: the ranks must have the same model")


def test_what_cannot_be_read_in_parts_is_read_whole_and_says_so() -> None:
    start = "each rank reads the whole model, and keeps its share then: "
    for found in CHECKS.told(2, "whole"):
        assert found["model"] == [f"{start}it is quantized while it is read, or once it is", "went through"]
        said, broken = found["broken"]
        assert said.startswith(f"{start}its structure cannot be told") and broken.startswith("BadModel")


def test_ranks_say_what_they_will_hold_and_refuse_what_cannot_be() -> None:
    first, second = CHECKS.told(2, "foretold")
    held = "each of 2 ranks will hold"
    for plenty, full, short in (first[k : k + 3] for k in (0, 3, 6)):
        assert plenty[0].startswith(held) and plenty[1:] == ["went through"]
        assert "likely too little: what would fit is" in full[1] and full[2] == "went through"
        (refused,) = short
        assert refused.startswith(f"BackendUnavailable: {held}") and "what would fit is" in refused
    assert [one[-1] for one in second] == [one[-1] for one in first] and all(len(one) == 1 for one in second)
    (_, plain, _), (_, shared, _) = first[:3], first[3:6]
    assert "what would fit is 4 devices with as much each, and parallel.shard = blocks or quant" in plain[1]
    assert "its shares of blocks), " in shared[0] and "what would fit is 4 devices" in shared[1]


def test_a_plan_says_what_ranks_would_hold_and_loads_nothing_that_cannot_fit(tmp_path, monkeypatch) -> None:
    tiny.make("flux").save_pretrained(tmp_path)
    whole, shared = foresee(str(tmp_path), 2, None, None)
    assert whole.startswith("each of 2 ranks will hold") and shared.endswith("with parallel.shard = blocks")
    with pytest.raises(BackendUnavailable, match=r"and has 9.31e-07 GiB: what would fit is a device with more memory"):
        foresee(str(tmp_path), 2, None, 1000)
    monkeypatch.setattr(memory, "free", lambda _: 1000.0)
    with pytest.raises(BackendUnavailable, match="fastdiff advise counts and measures nothing"):
        foresee(str(tmp_path), 2, None, 2**40)
    assert foresee("org/model", 2, None, 1000) == [], "it takes the hub to know"


@pytest.mark.parametrize(
    ("name", "dtype", "files"),
    [
        ("sd3", torch.float32, {}),
        ("wan", torch.bfloat16, {"max_shard_size": "30KB"}),  # which keeps modules in float32
        ("sd15", torch.float16, {"variant": "fp16"}),
        ("pixart", torch.bfloat16, {}),  # with a buffer that no file holds
    ],
    ids=str,
)
def test_shares_are_those_of_a_model_that_was_here(name, dtype, files, tmp_path) -> None:
    tiny.make(name).save_pretrained(tmp_path, **files)
    (structure, there), *_ = reading.readable(tmp_path, dtype)
    sizes, place = Sizes.of(tmp_path, dtype), Topology(1, 1, 3, 1)
    read = reading.read(structure, there, place, dtype, CPU)
    anatomy = anatomies(fastdiff.load(tmp_path, dtype=dtype))[0]
    assert sizes.blocks[0].sizes == tuple(map(nbytes, units(anatomy))), "counted from the heads of files"
    before = dict(anatomy.denoiser.named_parameters()) | dict(anatomy.denoiser.named_buffers())
    whole = {key: tensor.clone() for key, tensor in before.items()}
    shelf = Shelf(units(anatomy), anatomy.denoiser, Peers(Bus(place, 1.0)), CPU)
    shelf.take()
    portion = vars(read)["_fastdiff_portion"]
    for own, cut in zip(portion.kept, shelf.kept, strict=True):
        assert torch.equal(own.share, cut.share) and own.size == cut.size
        for a, b in zip(own.views, cut.views, strict=True):
            assert (a.begin, a.dtype, a.shape, a.stride) == (b.begin, b.dtype, b.shape, b.stride)
    shared = {id(view.tensor) for kept in portion.kept for view in kept.views}
    found = dict(read.named_parameters()) | dict(read.named_buffers())
    assert found.keys() == whole.keys() and not read.training
    for key, tensor in found.items():
        assert tensor.dtype == whole[key].dtype and tensor.requires_grad == before[key].requires_grad, key
        assert id(tensor) in shared or torch.equal(tensor, whole[key]), key


def test_shares_are_for_one_rank_of_one_number() -> None:
    own = Portion(1, 2, [], 0)
    assert own.lend(1, 2) == [] and own.used
    for rank, ranks in ((0, 2), (1, 3)):
        with pytest.raises(BadConfig, match="share 1 of 2 of a model's blocks"):
            own.lend(rank, ranks)


@pytest.mark.parametrize("version", [1, 2])
def test_memory_is_what_the_narrowest_group_leaves(version: int, tmp_path: Path) -> None:
    proc = tmp_path / "proc" / "self"
    proc.mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 8000 kB\n")
    assert memory.free(CPU, tmp_path) == 8000 * 1024
    top = tmp_path / "sys" / "fs" / "cgroup" / ("memory" if version == 1 else "")
    most, present = memory._LIMITS[2 - version]
    (proc / "cgroup").write_text("3:cpu:/x\n4:memory:/a/b\n" if version == 1 else "0::/a/b\n")
    for folder, limit in ((top, "max"), (top / "a", "5000"), (top / "a" / "b", "7000")):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / most).write_text(limit)
        (folder / present).write_text("1500")
        cached = "inactive_file 0\ntotal_inactive_file 500\n" if version == 1 else "inactive_file 500\n"
        (folder / "memory.stat").write_text(cached)
    assert memory.free(CPU, tmp_path) == 5000 - 1500 + 500
    assert memory.free(CPU, tmp_path / "elsewhere") == float("inf")
