"""Parallel methods on 2, 3 and 4 real processes over gloo; what is checked is in checks.py."""

from __future__ import annotations

import pytest

from . import checks
from .asked import Asked

NAMES = {
    2: (
        "every_family_in_patches", "every_family_in_halves", "every_transformer_by_heads", "in_float32", "odd_rows",
        "denoisers_alone", "several_pictures", "decoded", "weights_that_came_before_and_after", "controlled",
        "picture_to_picture_and_another_size", "strangers_become_alike", "displaced", "displaced_in_many_steps",
        "stepping", "replayed", "cached", "cached_everywhere",
        "renewed", "counted", "still", "broken_off", "ended_early", "guided_for_a_part",
        "a_lost_cycle_is_computed_again", "in_graphs", "in_more_graphs", "refused",
    ),
    3: (
        "every_family_in_patches", "odd_rows", "decoded", "strangers_become_alike", "replayed", "counted",
        "partly_conditioned", "refused",
    ),
    4: ("meshes", "more_meshes", "replayed"),
    1: ("alone",),
}  # fmt: skip
SLOW = {  # minutes on two processors: three and four processes share them
    2: (
        "in_float32", "several_pictures", "displaced_in_many_steps", "in_more_graphs", "cached_everywhere",
        "ended_early",
    ),
    3: ("every_family_in_patches", "odd_rows", "decoded", "strangers_become_alike", "replayed"),
    4: ("more_meshes", "replayed"),
}  # fmt: skip
CHECKS = Asked(checks, NAMES, SLOW)
told = CHECKS.told
pytestmark = pytest.mark.xdist_group("ranks")


@pytest.mark.parametrize(("ranks", "name"), CHECKS.cases, ids=str)
def test_check(ranks: int, name: str) -> None:
    CHECKS.agree(ranks, name)


def test_displaced_error_shrinks_with_the_step() -> None:
    found = told(2, "displaced")[0]
    for name in ("sd15", "sd3"):
        assert found[f"{name} distrifusion 8"] > 1.25 * found[f"{name} distrifusion 16"], f"{name}: {found}"


@pytest.mark.slow
def test_displaced_error_is_of_the_order_of_the_step() -> None:
    found = told(2, "displaced_in_many_steps")[0]
    for name in ("sd15", "sd3"):
        more, most = (found[f"{name} distrifusion {steps}"] for steps in (32, 64))
        assert 1.6 * most < more < 2.4 * most, f"{name}: {more}, {most}"


def test_partial_conditioning_is_monotone_and_full_where_it_sees_all() -> None:
    found = told(2, "displaced")[0]
    none, half, whole = (found[f"sd3 pcpp portion {portion} 8"] for portion in ("0", "0.5", "1"))
    assert none > half > whole
    assert whole == pytest.approx(found["sd3 distrifusion 8"], rel=1e-9)
    assert found["sd15 pcpp refreshed 8"] < 1e-11, "seeing everything in every step is the exact method"
    assert found["sd15 pcpp synchronous 8"] > 1e-6, "the bias stays without staleness"


def test_codecs_are_near():  # fmt: skip
    found = told(2, "displaced")[0]
    for name in ("sd15", "sd3"):
        assert 0 < found[f"{name} int8 8"] < 0.02 and 0 < found[f"{name} residual 8"] < 0.05


def test_parastep_errs_by_the_square_of_the_step() -> None:
    found = told(2, "stepping")[0]
    for solver in ("euler", "dpm++"):
        assert found[f"{solver} 1 16"] > 2.5 * found[f"{solver} 1 32"]
        assert found[f"{solver} 2 16"] < found[f"{solver} 1 16"]


def test_caches_skip_alike_on_all_ranks() -> None:
    for one in told(2, "cached")[1:]:
        for key, (skipped, _) in told(2, "cached")[0].items():
            assert "parastep" in key or one[key][0] == skipped


def test_what_is_too_old_is_renewed() -> None:
    assert told(2, "renewed")[0] == [1, 3, 3]


@pytest.mark.parametrize("ranks", [2, 3])
def test_bytes_are_the_formula(ranks: int) -> None:
    """16 picture tokens (4 rows of 4) of 32 channels, keys and values, batch 2, float32, in each of 4 blocks."""
    token, blocks, steps = 2 * 32 * 4 * 2, 4, 4
    rows = [4 // ranks + (rank < 4 % ranks) for rank in range(ranks)]
    for rank, one in enumerate(told(ranks, "counted")):
        whole = rows[rank] * 4 * token * (ranks - 1) * blocks
        assert one["patch"] == whole * steps
        neighbours = (rank > 0) + (rank < ranks - 1)
        part = -(-rows[rank] // 2) * 4 * token * neighbours * blocks
        assert one["pcpp"] == whole + part * (steps - 2), "the first sees all; the last sends nothing on"


def test_an_exception_ends_all_ranks() -> None:
    first, last = told(2, "broken_off")
    assert all(text.startswith("KeyError") for text in last)
    assert all(text.startswith("PeerLost: rank 1 broke off or died: rank 0 waited") for text in first), first
    assert all("at step" in text for text in first)


def test_a_single_process_is_refused() -> None:
    (said,) = told(1, "alone")
    assert said == "parallel needs several processes: set parallel.devices to 2 or more, or start them with torchrun"


REASONS = {
    "rows": "rows of latents make 1 units of 4 rows",
    "world": "parallel.devices = 7, but {ranks} processes run",
    "unet heads": "cannot split a unet2d denoiser",
    "compiled": "patch cuts the picture inside the denoiser; set compile.scope = blocks",
    "vae": "parallel.vae: AutoencoderKLCogVideoX cannot decode by rows",
    "configs": "the ranks must have the same parallel.portion: rank",
    "weights": "the ranks must have the same model",
    "kinds": "the ranks must have the same kind of device",
    "versions": "the ranks must have the same versions",
}


@pytest.mark.parametrize("ranks", [2, 3])
def test_bad_input_is_refused_with_the_reason(ranks: int) -> None:
    for one in told(ranks, "refused"):
        for label, reason in REASONS.items():
            assert reason.format(ranks=ranks) in one[label]
    if ranks == 3:
        assert "2 heads cannot be shared by 3 ranks" in told(3, "refused")[0]["heads"]


def test_checks_are_all_run() -> None:
    CHECKS.all_run()
