"""Rivals on tiny random pipelines: they run, really skip, forget the last picture, and leave no trace."""

import diffusers
import pytest
import torch
from torch import nn

from fastdiff.bench import Prompts, Settings, plan, prompts_for, run
from fastdiff.bench.peer import Fitted, Peer
from fastdiff.bench.peers import peers_for
from fastdiff.bench.peers_dit import Ratios, _text_through
from fastdiff.bench.probe import Probe
from fastdiff.bench.twin import Clock, Counter, Twin
from fastdiff.errors import BackendUnavailable, UnknownName, UnsupportedModel
from tests.some import some
from tests.tiny import denoiser, make

STEPS = 12
UNET = {peer.name: peer for peer in peers_for(make("sd15"), STEPS)}
DIT = {peer.name: peer for peer in peers_for(make("sd3"), STEPS)}
# rivals by the whole steps that they compute of 12; None where random weights decide
FIXED = {
    "DeepCache N=2": 6, "DeepCache N=3": 4, "DeepCache N=5": 3, "DeepCache N=3 branch 1": 4,
    "T-GATE gate 5": 12, "T-GATE gate 5 + DeepCache N=3": 6, "tomesd r=0.5": 12, "PAB 2/3": 12,
    "TaylorSeer attention N=3": 12, "TaylorSeer lite N=2": 7, "TaylorSeer lite N=3": 6, "FasterCache": 12,
}  # fmt: skip
FIXED_DIT = {
    "TaylorSeer N=3": 12, "TaylorSeer lite N=3": 6, "PAB 2": 12, "FasterCache": 12, "MagCache 0.24": None,
    "FirstBlockCache 0.2": None, "SeaCache 0.5": None, "DBCache F1B0 0.3": None, "DBCache F1B0 0.3 + TaylorSeer": None,
    "DBCache SCM fast": 7, "DBCache SCM fast + TaylorSeer": 7, "DBCache SCM fast + DMD": 7,
    "DBCache SCM fast + FoCa": 7, "DBCache SCM ultra dynamic + DMD": None, "DBCache F1B0 0.5 W8 MC6 + FoCa": None,
}  # fmt: skip
CASES = [*(("sd15", UNET[name], count) for name, count in FIXED.items()),
         *(("sd3", DIT[name], count) for name, count in FIXED_DIT.items())]  # fmt: skip


def latents(call, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return call("a red cat", num_inference_steps=STEPS, generator=generator, output_type="latent", guidance_scale=3.0)[
        0
    ]


def traces(module):
    return {
        name: (type(part), sorted(vars(part)), [len(part._forward_hooks), len(part._forward_pre_hooks)])
        for name, part in module.named_modules()
    }


@pytest.mark.parametrize(("family", "peer", "count"), some(CASES, 3), ids=lambda value: getattr(value, "name", None))
def test_runs_skips_forgets_and_leaves_no_trace(family, peer, count):
    if peer.package != "diffusers":
        pytest.importorskip(peer.package.replace("-", "_"))
    if "DeepCache" in peer.name:
        pytest.importorskip("DeepCache")
    pipe = make(family)
    before, known, own_call = latents(pipe), traces(denoiser(pipe)), type(pipe).__call__
    with peer.installed(pipe) as running:
        first = latents(running.call)
        computed = running.computed()
        latents(running.call, seed=1)
        assert torch.equal(latents(running.call), first)  # nothing is left of the other picture
        assert running.computed() == computed
    assert not torch.equal(first, before) or computed == STEPS
    assert computed == count if count is not None else 0 < computed <= STEPS
    assert torch.equal(latents(pipe), before)
    assert traces(denoiser(pipe)) == known and type(pipe).__call__ is own_call
    assert "tgate" not in vars(pipe) and "deepcache" not in vars(pipe)


def test_masks_of_cache_dit_are_stretched_to_the_steps(capsys):
    pytest.importorskip("cache_dit")
    counts = []
    capsys.readouterr()
    for preset in ("slow", "medium", "fast", "ultra"):
        with {p.name: p for p in peers_for(make("sd3"), 28)}[f"DBCache SCM {preset}"].installed(make("sd3")) as running:
            running.call("a cat", num_inference_steps=28, output_type="latent")
            counts.append(running.computed())
    assert counts == [18, 15, 11, 8]
    assert not capsys.readouterr().out  # rows go there


def test_each_calibrator_of_cache_dit_draws_its_own_picture():
    pytest.importorskip("cache_dit")
    seen = []
    for name in ("", " + TaylorSeer", " + DMD", " + FoCa"):
        with DIT[f"DBCache SCM fast{name}"].installed(make("sd3")) as running:
            seen.append(latents(running.call))
    assert all(torch.isfinite(one).all() for one in seen)
    assert not any(torch.equal(one, other) for k, one in enumerate(seen) for other in seen[:k])
    assert DIT["DBCache SCM fast + DMD"].record()["calibrator"] == "DMD"


def test_what_is_switched_off_for_the_text_is_what_fails_and_changes_no_picture():
    """The forecast of a stream that SD3's last block does not return; where it is handed through, all are the same."""
    cache_dit = pytest.importorskip("cache_dit")
    mask = {"steps_computation_mask": [1, 1, 1, 1, 1, 0, 1, 0, 1, 0, 0, 1], "steps_computation_policy": "static"}

    def drawn(text, through):
        twin = Twin(make("sd3"))
        if through:
            _text_through(twin)
        config = cache_dit.DBCacheConfig(Fn_compute_blocks=1, Bn_compute_blocks=0, num_inference_steps=STEPS, **mask)
        calibrator = cache_dit.DMDCalibratorConfig(enable_encoder_calibrator=text)
        cache_dit.enable_cache(twin.pipe, cache_config=config, calibrator_config=calibrator)
        return latents(twin.pipe)

    assert torch.equal(drawn(False, False), drawn(True, True))
    with pytest.raises(AssertionError, match="not found"):
        drawn(True, False)


def test_a_cache_saves_the_work_that_it_says():
    pipe, calls = make("sd3"), []
    with DIT["PAB 2"].installed(pipe) as running:
        for block in running.pipe.transformer.transformer_blocks:
            block.attn.to_q.register_forward_hook(lambda *_: calls.append(1))
        latents(running.call)
    assert 0 < len(calls) < 4 * STEPS


def test_sea_cache_skips_with_the_context_of_the_adapter():
    """It computes everything, silently, where nobody tells it step and sigma."""
    pipe = make("sd3")
    with DIT["SeaCache 0.5"].installed(pipe) as running:
        latents(running.call)
        assert running.computed() < STEPS


def test_ratios_are_diffusers_own_and_measured_once(capsys):
    from diffusers.hooks import MagCacheConfig, apply_mag_cache

    pipe = make("sd3")
    ratios = Ratios(3.0, captions=2)
    found = ratios.of(Twin(pipe), STEPS)
    assert ratios.of(Twin(pipe), STEPS) is found and len(found) == STEPS and found[0] == 1.0
    twin = Twin(pipe)
    apply_mag_cache(twin.denoiser, MagCacheConfig(calibrate=True, num_inference_steps=STEPS))
    generators = [torch.Generator().manual_seed(1000 + k) for k in range(2)]
    texts = list(prompts_for(pipe, 2, 0, held_out=False).texts)
    twin.pipe(texts, num_inference_steps=STEPS, generator=generators, output_type="latent", guidance_scale=3.0)
    printed = capsys.readouterr().out.strip().splitlines()[-1]
    assert [float(x) for x in printed.strip("[]").split(",")] == pytest.approx(found, rel=1e-4)


def test_twin_shares_weights_and_nothing_else():
    pipe = make("sd15")
    twin = Twin(pipe)
    assert type(twin.pipe) is not type(pipe) and isinstance(twin.pipe, diffusers.StableDiffusionPipeline)
    assert type(twin.pipe).__name__ == "StableDiffusionPipeline" and twin.pipe.vae is pipe.vae
    ours, theirs = dict(pipe.unet.named_parameters()), dict(twin.pipe.unet.named_parameters())
    assert all(theirs[name] is weight for name, weight in ours.items())
    assert not {*map(id, pipe.unet.modules())} & {*map(id, twin.pipe.unet.modules())}
    assert torch.equal(latents(twin.pipe), latents(pipe))


def test_the_clock_tells_branches_from_steps_and_the_counter_follows():
    pipe = make("flux")  # two calls of the denoiser a step
    twin = Twin(pipe)
    clock, counter, seen = Clock(twin), Counter(twin), []

    def watch(inner):
        def forward(*args, **kwargs):
            clock.see(args, kwargs)
            seen.append((clock.step, clock.branch))
            return inner(*args, **kwargs)

        return forward

    twin.around_denoiser(watch)
    options = {"negative_prompt": "bad", "true_cfg_scale": 4.0, "height": 64, "width": 64, "max_sequence_length": 16}
    twin.pipe("a cat", num_inference_steps=3, output_type="latent", **options)
    assert seen == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert counter.computed == 3 == clock.total


@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_the_clock_reads_the_schedulers_own_timesteps(family):
    twin = Twin(make(family))
    clock, seen = Clock(twin), []

    def watch(inner):
        def forward(*args, **kwargs):
            clock.see(args, kwargs)
            given = kwargs["timestep"] if "timestep" in kwargs else args[1]
            assert clock.timestep == clock.now() == float(given.reshape(-1)[0])
            seen.append((clock.step, clock.timestep))
            return inner(*args, **kwargs)

        return forward

    twin.around_denoiser(watch)
    latents(twin.pipe)
    assert seen == list(enumerate(twin.pipe.scheduler.timesteps.tolist()))


def test_probe_times_a_rival_that_replaces_forward():
    with UNET["TaylorSeer lite N=3"].installed(make("sd15")) as running:
        with Probe(running.pipe) as probe:
            latents(running.call)
        assert 0 < probe.denoising_seconds < probe.seconds


class Vandal(Peer):
    """Harms the weights, which twins share."""

    def fit(self, twin):
        with torch.no_grad():
            twin.denoiser.conv_out.bias.add_(1)
        return Fitted(twin.pipe)


class Stranger(Peer):
    def fit(self, twin):
        raise RuntimeError("broken\nby a new version")


def test_rows_of_rivals_and_of_other_solvers(monkeypatch):
    pipe, only = make("sd15"), ("StableDiffusionPipeline",)
    settings = Settings(steps=6, rounds=1, converged_steps=None, solvers=("dpm++", "unipc"))
    contenders = [
        plan.Contender(peer.name, "peer", 6, peer=peer)
        for peer in (
            UNET["TaylorSeer lite N=2"],
            Stranger("stranger", "diffusers", {}, only),
            Stranger("absent", "no-such-package", {}, only),
            Stranger("for others", "diffusers", {}, ("FluxPipeline",)),
        )
    ]
    scheduler = pipe.scheduler
    rows = {row.name: row for row in run(pipe, contenders, Prompts(("a cat", "a dog")), settings)}
    assert pipe.scheduler is scheduler
    assert rows["stranger"].error == "broken" and "pip install" in rows["absent"].error
    assert "FluxPipeline" in rows["for others"].error
    good = rows["TaylorSeer lite N=2"]
    assert good.kind == "peer" and good.computed_steps == 4 and "identifiers" in good.notes[-1]
    assert good.config["package"] == "diffusers" and good.config["version"] and good.config["cache_interval"] == 2
    assert rows["4 steps"].scheduler == "DDIMScheduler" and "no multiple" not in str(rows["4 steps"].notes)
    assert rows["4 steps DPM++ 2M"].scheduler == "DPMSolverMultistepScheduler"
    assert rows["4 steps UniPC"].kind == "fewer_steps" and rows["4 steps UniPC"].computed_steps == 4
    assert len({rows[name].psnr for name in ("4 steps", "4 steps DPM++ 2M", "4 steps UniPC")}) == 3


def test_who_leaves_the_stock_pipeline_changed_is_told_on():
    pipe = make("sd15")
    vandal = Vandal("vandal", "diffusers", {}, ("StableDiffusionPipeline",))
    settings = Settings(steps=2, rounds=1, converged_steps=None)
    rows = run(pipe, [plan.Contender("vandal", "peer", 2, peer=vandal)], Prompts(("a cat",)), settings)
    assert "not itself" in rows[1].error
    assert all("trust no row" in " ".join(row.notes) for row in rows)


def test_rivals_are_chosen_by_words_of_their_names():
    pipe, settings = make("sd3"), Settings(steps=STEPS)
    every = plan.rivals(pipe, settings)
    chosen = plan.rivals(pipe, settings, ["FoCa", "PAB 2"])
    assert {one.name for one in chosen} == {one.name for one in every if "FoCa" in one.name or one.name == "PAB 2"}
    assert len(every) > len(chosen) > 2
    with pytest.raises(UnknownName, match="DMDx"):
        plan.rivals(pipe, settings, ["FoCa", "DMDx"])


def test_missing_packages_and_other_pipelines_are_refused():
    with pytest.raises(BackendUnavailable, match="no-such-package is not installed"):
        Stranger("x", "no-such-package", {}, ()).check(make("sd15"))
    with pytest.raises(UnsupportedModel, match="not to StableDiffusion3Pipeline"):
        UNET["PAB 2/3"].check(make("sd3"))


def test_every_rival_has_its_own_name_and_a_plain_record():
    import json

    for family in (UNET, DIT):
        assert len(family) > 10
        for peer in family.values():
            json.dumps(peer.record(), allow_nan=False)
            assert not any(isinstance(value, nn.Module) for value in peer.record().values())
