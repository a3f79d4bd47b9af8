"""A whole benchmark on a tiny random pipeline. Says nothing of speed or quality, only that the protocol is kept."""

import json
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

import fastdiff
from fastdiff import output
from fastdiff.bench import Contender, Observer, Prompts, Settings, contenders, prompts_for, render, run, sources
from fastdiff.bench.metrics import PSNR_CAP
from fastdiff.bench.plan import fewer_steps
from fastdiff.bench.probe import Probe
from fastdiff.bench.row import as_json
from fastdiff.bench.scenes import scenes
from fastdiff.cli.bench import bench
from fastdiff.config import Config
from fastdiff.errors import BackendUnavailable, BadConfig, FastdiffError, UnknownName, UnsupportedModel
from tests.tiny import make

SCENES = tuple(scenes(0, 2, held_out=True))
PROMPTS = Prompts(tuple(scene.caption for scene in SCENES), SCENES)
SETTINGS = Settings(steps=4, rounds=1, batch=2, guidance_scale=3.0, converged_steps=8)
HALF = Contender("half", "fastdiff", 4, Config(cache={"method": "ab_cache", "interval": 2, "warmup_steps": 0}))
NEUTRAL = Contender("neutral", "fastdiff", 4, Config(cache={"method": "ab_cache", "interval": 1}))
IMPOSSIBLE = Contender("impossible", "fastdiff", 4, Config(cache={"method": "first_block"}))
BREAKS = Contender("breaks", "fastdiff", 4, Config(cache={"method": "static", "compute_steps": [0, 9]}))


class Watcher(Observer):
    def __init__(self):
        self.images, self.total, self.work = {}, 0, 0

    def planned(self, work):
        self.total = work

    def done(self, name, work):
        self.work += work

    def drawn(self, name, images, decibels):
        self.images[name] = images


@pytest.fixture(scope="module")
def measured():
    pipe, watcher = make("sd15"), Watcher()
    rows = run(pipe, [HALF, NEUTRAL, IMPOSSIBLE, BREAKS], PROMPTS, SETTINGS, observer=watcher, command="bench it")
    return pipe, {row.name: row for row in rows}, watcher


def test_all_rows_are_there_with_the_honest_rival(measured):
    _, rows, _ = measured
    kinds = {name: row.kind for name, row in rows.items()}
    assert kinds == {
        "baseline": "baseline", "half": "fastdiff", "neutral": "fastdiff", "impossible": "fastdiff",
        "breaks": "fastdiff", "2 steps": "fewer_steps",
    }  # fmt: skip
    assert rows["half"].computed_steps == rows["2 steps"].computed_steps == rows["2 steps"].steps == 2
    assert rows["half"].steps == rows["neutral"].computed_steps == rows["baseline"].computed_steps == 4


def test_every_row_is_compared_with_the_unaccelerated_image(measured):
    _, rows, watcher = measured
    assert rows["baseline"].speedup == rows["baseline"].speedup_denoising == 1
    assert rows["baseline"].psnr == rows["neutral"].psnr == PSNR_CAP
    assert rows["baseline"].ssim == pytest.approx(1, abs=1e-5)
    assert rows["half"].psnr < PSNR_CAP
    assert rows["baseline"].psnr_converged < PSNR_CAP
    error = np.mean((watcher.images["half"] - watcher.images["baseline"]).astype(np.float64) ** 2, axis=(1, 2, 3))
    assert rows["half"].psnr == pytest.approx(float(np.mean(-10 * np.log10(error))), abs=1e-3)


def test_the_baseline_is_the_stock_pipeline(measured):
    pipe, _, watcher = measured
    generators = [torch.Generator().manual_seed(k) for k in range(2)]
    expected = make("sd15")(
        list(PROMPTS.texts), num_inference_steps=4, guidance_scale=3.0, generator=generators, output_type="np"
    ).images
    assert np.array_equal(watcher.images["baseline"], expected)
    assert "_fastdiff" not in vars(pipe)
    assert vars(pipe)["_progress_bar_config"] == vars(make("sd15"))["_progress_bar_config"]


def test_a_failing_row_says_why_and_the_others_live(measured):
    _, rows, _ = measured
    assert "transformer blocks" in rows["impossible"].error
    assert "compute_steps holds 9" in rows["breaks"].error
    assert rows["impossible"].latency_s is None and rows["breaks"].speedup is None
    assert all(rows[name].error is None and rows[name].latency_s > 0 for name in ("half", "neutral", "2 steps"))


def test_rows_are_valid_json_with_the_promised_keys(measured):
    _, rows, _ = measured
    read = json.loads(as_json(list(rows.values())))
    promised = {
        "name", "steps", "computed_steps", "latency_s", "speedup", "psnr", "ssim", "psnr_converged", "prompt_accuracy",
        "peak_memory_mb", "config",
    }  # fmt: skip
    assert isinstance(read, list) and all(promised <= set(row) for row in read)
    assert read[1]["config"]["cache"]["interval"] == 2
    assert Config(**read[1]["config"]) == HALF.config
    assert all(0 <= row["prompt_accuracy"] <= 1 and 0 <= row["all_correct"] <= 1 for row in read if not row["error"])
    assert read[0]["command"] == "bench it" and read[0]["seeds"] == [0, 1]


def test_progress_reaches_its_total_when_nothing_fails():
    watcher = Watcher()
    settings = Settings(steps=2, rounds=1, converged_steps=3)
    run(make("sd15"), [replace(HALF, steps=2)], Prompts(("a cat",)), settings, observer=watcher)
    assert watcher.work == watcher.total > 0


def test_scheduler_with_noise_has_no_converged_reference():
    pipe = make("sd15")
    pipe.scheduler = diffusers.EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    state = torch.get_rng_state()
    (row,) = run(pipe, [], Prompts(("a cat",)), Settings(steps=2, rounds=1))
    assert row.psnr_converged is None and "adds noise" in row.notes[0]
    assert torch.equal(state, torch.get_rng_state())


def test_failure_of_the_stock_pipeline_is_raised():
    with pytest.raises(UnsupportedModel, match="without any acceleration: text input"):
        run(make("sd15"), [HALF], Prompts((None,)), SETTINGS)


def test_fewer_steps_counts_evaluations():
    pipe = make("sd15")
    pipe.scheduler = diffusers.HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    settings = Settings(steps=4, rounds=1, converged_steps=None)
    (row,) = run(pipe, [], Prompts(("a cat",)), settings)
    assert row.computed_steps == 7 and row.prompt_accuracy is None and "asked for" in row.notes[0]
    assert [c.steps for c in fewer_steps([7, 4, 4, 1], 4, 7)] == [2, 1]


def test_probe_times_the_denoiser_and_leaves_no_hook():
    pipe = make("sd15")
    with Probe(pipe) as probe:
        pipe("a cat", num_inference_steps=2, output_type="latent")
    assert 0 < probe.denoising_seconds < probe.seconds
    assert not pipe.unet._forward_hooks and not pipe.unet._forward_pre_hooks


def test_plan_of_files_presets_and_overrides(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('[cache]\nmethod = "deepcache"\n')
    pipe = make("sd15")
    (one,) = contenders(pipe, sources([], [file], ["cache.interval=5"]), 4)
    assert one.name == "mine cache.interval=5" and one.config.cache.interval == 5
    with pytest.raises(UnknownName, match="preset"):
        sources(["nonsense"], [], [])
    (tmp_path / "other").mkdir()
    twin = tmp_path / "other" / "mine.toml"
    twin.write_text(file.read_text())
    with pytest.raises(BadConfig, match="would be called 'mine'"):
        sources([], [file, twin], [])
    assert Settings.of(pipe, None, None).steps == 50


def test_prompts_are_repeated_up_to_the_count(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("one\n\ntwo\n")
    pipe = make("sd15")
    assert prompts_for(pipe, 3, 0, file).texts == ("one", "two", "one")
    assert len(prompts_for(pipe, 20, 0)) == 20
    file.write_text("\n")
    with pytest.raises(BadConfig, match="holds no prompt"):
        prompts_for(pipe, 3, 0, file)


def test_plot_and_table_show_failures_only_as_text(measured):
    _, rows, _ = measured
    left, right = render.pareto(list(rows.values())).axes
    for axes in (left, right):
        shown = " ".join(text.get_text() for text in axes.texts)
        assert "half" in shown and "2 steps" in shown and "impossible" not in shown
    table = render.markdown(list(rows.values()))
    assert "| impossible | 4 | failed: " in table and "| neutral | 4 | 4 |" in table and "identical" in table


def test_files_are_whole_or_absent(tmp_path):
    file = tmp_path / "rows.json"

    def full(part):
        part.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(FastdiffError, match="No space left"):
        output.write(file, full)
    assert list(tmp_path.iterdir()) == []
    output.write(file, lambda part: part.write_text("all"))
    assert file.read_text() == "all"
    for bad, message in (
        (file, "--overwrite"),
        (tmp_path, "is a directory"),
        (tmp_path / "no" / "x", "does not exist"),
    ):
        with pytest.raises(BadConfig, match=message):
            output.check([bad], overwrite=False)
    output.check([file, None], overwrite=True)


@pytest.fixture
def command(monkeypatch):
    app = typer.Typer()
    app.command()(bench)
    loaded = []
    monkeypatch.setattr(fastdiff, "load", lambda model: loaded.append(model) or make("sd15"), raising=False)
    return lambda *args: CliRunner().invoke(app, [str(a) for a in args]), loaded


def test_command_writes_everything(command, tmp_path):
    invoke, _ = command
    config = tmp_path / "mine.toml"
    config.write_text('[cache]\nmethod = "deepcache"\ninterval = 2\n')
    files = [tmp_path / name for name in ("rows.json", "plot.png", "sheet.png")]
    arguments = ["-m", "tiny", "--config", config, "--steps", 4, "--prompts", 2, "--rounds", 1, "--no-converged"]
    arguments += [x for flag, file in zip(("--json", "--plot", "--sheet"), files, strict=True) for x in (flag, file)]
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    assert "| mine | 4 | 2 |" in result.stdout
    assert [row["name"] for row in json.loads(files[0].read_text())] == ["baseline", "mine", "2 steps"]
    assert all(file.stat().st_size > 1000 for file in files[1:])
    assert sorted(tmp_path.iterdir()) == sorted([config, *files])


def test_a_folder_stands_for_its_configs(tmp_path):
    for name in ("b", "a"):
        (tmp_path / f"{name}.toml").write_text('[cache]\nmethod = "deepcache"\n')
    (tmp_path / "notes.txt").write_text("no config")
    assert list(sources([], [tmp_path], [])) == ["a", "b"]
    with pytest.raises(BadConfig, match=r"holds no \.toml file"):
        (tmp_path / "empty").mkdir()
        sources([], [tmp_path / "empty"], [])


def test_command_prints_json_and_fails_if_nothing_could_be_measured(command, tmp_path):
    invoke, _ = command
    config = tmp_path / "mine.toml"
    config.write_text('[cache]\nmethod = "first_block"\n')
    result = invoke("--config", config, "--steps", 2, "--prompts", 1, "--rounds", 1, "--no-converged", "--json", "-")
    assert result.exit_code == 1
    assert [row["error"] is None for row in json.loads(result.stdout)] == [True, False]


def test_command_measures_rivals_and_judges(command, tmp_path):
    invoke, _ = command
    config, file, judged = tmp_path / "mine.toml", tmp_path / "rows.json", tmp_path / "verdict.json"
    config.write_text('[cache]\nmethod = "deepcache"\ninterval = 2\n')
    arguments = ["--config", config, "--peers", "--scheduler", "unipc", "--json", file, "--verdict", judged]
    result = invoke(*arguments, "--steps", 4, "--prompts", 1, "--rounds", 1, "--no-converged")
    assert result.exit_code == 0, result.output
    rows = {row["name"]: row for row in json.loads(file.read_text())}
    assert rows["baseline"]["scheduler"] == rows["PAB 2/3"]["scheduler"] == "UniPCMultistepScheduler"
    assert rows["2 steps"]["error"] is None and rows["2 steps DPM++ 2M"]["error"] is None
    assert not any(name.endswith("UniPC") for name in rows)  # it is the own one already
    found = {entry["rival"]: entry for entry in json.loads(judged.read_text())}
    assert {"PAB 2/3", "2 steps", "2 steps DPM++ 2M"} <= set(found) and "mine" not in found
    assert "rivals beaten" in result.stdout


def test_command_refuses_before_it_loads(command, tmp_path, monkeypatch):
    invoke, loaded = command
    taken = tmp_path / "rows.json"
    taken.write_text("precious")
    assert isinstance(invoke("--json", taken).exception, BadConfig)
    assert isinstance(invoke("--plot", tmp_path / "plot.xyz").exception, BadConfig)
    assert isinstance(invoke("--preset", "nonsense").exception, UnknownName)
    assert isinstance(invoke("--scheduler", "nonsense").exception, UnknownName)
    assert isinstance(invoke("--verdict", taken).exception, BadConfig)
    monkeypatch.setattr("fastdiff.bench.metrics.find_spec", lambda name: None)
    missing = invoke().exception
    assert isinstance(missing, BackendUnavailable) and "pip install 'fastdiff[bench]'" in str(missing)
    assert loaded == [] and taken.read_text() == "precious"
