"""`fastdiff calibrate`: writes a plan that `generate` uses and a PNG carries along."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastdiff.bench import prompts as benching
from fastdiff.bench.scenes import scenes
from fastdiff.images import read

FEW = ("--steps", 6, "--prompts", 2, "--set", "cache.computed_steps=3")


@pytest.fixture
def plan(cli, model: str) -> Path:
    assert cli("calibrate", "-m", model, "-o", "plan.json", *FEW).code == 0
    return Path("plan.json")


def test_a_plan_is_written_and_told(cli, model: str) -> None:
    done = cli("calibrate", "-m", model, "-o", "plan.json", *FEW)
    assert (done.code, done.files) == (0, ["plan.json"])
    found = json.loads(Path("plan.json").read_text())
    steps = ", ".join(map(str, found["compute"]))
    assert f"computes 3 of 6 steps: {steps}; predicted error {found['error']:.2%}" in done.err
    assert (found["version"], found["scheduler"], len(found["sigmas"])) == (2, "DDIMScheduler", 6)
    assert [file.name for file in Path().iterdir()] == ["plan.json"], "nothing else is left behind"


def test_json(cli, model: str) -> None:
    told = json.loads(cli("calibrate", "-m", model, "-o", "p.json", "--json", "--batch", 1, *FEW).out)
    assert (told["file"], told["steps"], told["computed_steps"], len(told["compute"])) == ("p.json", 6, 3, 3)


def test_generate_uses_it_and_the_png_replays_without_it(cli, model: str, plan: Path) -> None:
    use = ("--set", "cache.method=dp", "--set", f"cache.plan={plan}")
    done = cli("generate", "a cat", "-m", model, "--steps", 6, "--seed", 1, "-o", "a.png", *use)
    assert (done.code, done.files) == (0, ["a.png"])
    assert "6 steps: 3 computed, 3 cached" in done.err
    plan.unlink()
    again = cli("generate", "--from-image", "a.png", "-m", model, "-o", "b.png")
    assert again.code == 0
    first, second = read(Path("a.png")), read(Path("b.png"))
    assert first.config == second.config and first.report["branches"] == second.report["branches"]
    assert _pixels("a.png") == _pixels("b.png")
    rows = cli("inspect", "a.png").out.splitlines()
    assert any(row.startswith("cache.plan ") and "..." in row for row in rows), "too long for a table"
    assert json.loads(cli("inspect", "a.png", "--json").out)["config"]["cache"]["plan"]["compute"]


def _pixels(path: str) -> bytes:
    from PIL import Image

    with Image.open(path) as image:
        return image.tobytes()


def test_a_config_may_name_the_plan_that_is_to_be_made(cli, model: str) -> None:
    Path("sub").mkdir()
    Path("sub/c.toml").write_text('[cache]\nmethod = "dp"\ncomputed_steps = 2\nplan = "plan.json"\n')
    made = cli("calibrate", "-m", model, "--config", "sub/c.toml", "-o", "sub/plan.json", "--steps", 4, "--prompts", 1)
    assert made.code == 0
    used = cli("generate", "a cat", "-m", model, "--config", "sub/c.toml", "--steps", 4, "--seed", 1)
    assert "4 steps: 2 computed, 2 cached" in used.err


def test_an_embedded_model_is_calibrated_on_training_captions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benching, "embedded_name", lambda _pipe: "shapes-unet")
    apart, measured = (benching.prompts_for(None, 8, 0, held_out=split) for split in (False, True))
    assert [scene.held_out for scene in apart.scenes or ()] == [False] * 8
    assert apart.texts == tuple(scene.caption for scene in scenes(0, 8, held_out=False))
    assert not set(apart.texts) & set(measured.texts)


def test_prompts_of_a_file(cli, model: str) -> None:
    Path("p.txt").write_text("a cat\na dog\n")
    assert cli("calibrate", "-m", model, "-o", "a.json", "--prompt-file", "p.txt", *FEW).code == 0
    missing = cli("calibrate", "-m", model, "-o", "b.json", "--prompt-file", "none.txt", *FEW)
    assert missing.code == 2 and "'none.txt' cannot be read" in missing.err
    assert not Path("b.json").exists()


def test_an_existing_file_is_kept(cli, model: str, plan: Path) -> None:
    before = plan.read_text()
    refused = cli("calibrate", "-m", model, "-o", plan, *FEW)
    assert refused.code == 2 and "exists; pass --overwrite" in refused.err
    assert cli("calibrate", "-m", model, "-o", plan, "--overwrite", "--guidance-scale", 2, *FEW).code == 0
    assert plan.read_text() != before


REFUSED = {
    "no output": ((), "Missing option '--output'"),
    "no directory": (("-o", "none/plan.json"), "directory 'none' does not exist"),
    "another method": (
        ("-o", "p.json", "--set", "cache.method=deepcache"),
        "cache method deepcache has nothing to calibrate; set cache.method to",
    ),
    "preset with another method": (
        ("-o", "p.json", "--preset", "fast"),
        "cache method ab_cache has nothing to calibrate",
    ),
    "a file that is no config": (("-o", "p.json", "--config", "none.toml"), "'none.toml' does not exist"),
    "layers that wait for nobody": (
        ("-o", "p.json", "--set", "parallel.method=distrifusion", "--set", "parallel.sync_kb=9"),
        "say how many there are with --set parallel.devices=N",
    ),
    "both": (("-o", "p.json", "--config", "c.toml", "--preset", "fast"), "exclude each other"),
    "no prompts": (("-o", "p.json", "--prompts", "0"), "--prompts"),
    "too many computed": (("-o", "p.json", "--steps", "6"), "computed_steps = 20: a run of 6 takes 1 to 6"),
    "unknown setting": (("-o", "p.json", "--set", "cache.computed=3"), "did you mean 'computed_steps'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_calibrated_is_refused(cli, model: str, case: str) -> None:
    arguments, reason = REFUSED[case]
    done = cli("calibrate", "-m", model, *arguments)
    assert (done.code, done.out) == (2, "")
    assert reason in done.err
    assert not Path("p.json").exists()
