"""Law 6: aggressive settings really skip, and the report says how much; what a cached step sees is what it should."""

from __future__ import annotations

import diffusers
import pytest
import torch
from torch import Tensor, nn

import fastdiff
from fastdiff.errors import BadConfig
from tests import tiny
from tests.caching.control import control_image, controlled
from tests.laws.rows import ONCE, ONE_ROW_A_FAMILY, ROWS, STEPS, SUPPORTED, accelerate, each

UNETS = ("sd15", "sdxl", "sd15_two_layers")
SKIPS = {"sd15": 6, "sdxl": 6, "sd15_two_layers": 12}


class Executions:
    """Counts how often modules truly run, and on how many rows of their input, by hooks that no method replaces."""

    def __init__(self, **modules: nn.Module) -> None:
        self.counts, self.rows = dict.fromkeys(modules, 0), dict.fromkeys(modules, 0)
        for name, module in modules.items():
            module.register_forward_hook(lambda _module, args, _out, name=name: self._count(name, args))

    def _count(self, name: str, args: tuple) -> None:
        self.counts[name] += 1
        self.rows[name] += len(args[0]) if args else 0


@each(SUPPORTED, quick=[*ONCE, *ONE_ROW_A_FAMILY])
def test_the_report_counts_what_was_really_computed(row, name):
    pipe, expected = tiny.make(name), ROWS[row]
    executions = Executions(leaf=expected.leaf(pipe), denoiser=tiny.denoiser(pipe))
    handle = accelerate(pipe, row)
    tiny.run(pipe, name, steps=STEPS)
    report, calls = handle.report, 2 if name in tiny.TWO_CALLS else 1
    assert executions.counts["denoiser"] == calls * STEPS
    assert executions.rows["leaf"] == expected.rows
    if expected.saves == 2:  # both halves of guidance, so that the layer does not run at all
        assert executions.counts["leaf"] == calls * expected.computed
    assert (report.steps, report.computed, report.cached) == (STEPS, expected.computed, expected.cached)
    assert report.partly == expected.partly
    full = [expected.computed, expected.computed - expected.partly][:calls]
    assert [line.count("computed") for line in report.branches.values()] == full
    told = report.to_dict()
    assert list(told["branches"]) == (["cond", "uncond"] if calls == 2 else ["batch"])
    assert f"{report.computed} computed, {report.cached} cached" in str(report)
    assert ("with one branch cached" in str(report)) == (expected.partly > 0)
    assert report.notes == []


@pytest.mark.parametrize("name", tiny.TWO_CALLS)
@pytest.mark.parametrize("row", ["ab_cache", "first_block", "fora", "faster_diffusion"])
def test_the_report_is_right_when_guidance_is_dropped_halfway(row, name):
    """The uncond branch ends early; the steps after that are cached or computed by what the cond branch did."""
    pipe = tiny.make(name)
    executions = Executions(leaf=ROWS[row].leaf(pipe))
    handle = accelerate(pipe, row)

    def drop_guidance(pipe, step):
        if step == 2:
            pipe._guidance_scale = 1.0

    tiny.run(pipe, name, steps=STEPS, **tiny.at_each_step(name, drop_guidance))
    if name == "wan":
        assert len([s for s in handle.report.branches[1] if s != "absent"]) == 3
    assert handle.report.computed == ROWS[row].computed
    assert executions.counts["leaf"] == sum(line.count("computed") for line in handle.report.branches.values())


# not "static", whose list is of another length, nor what leaves out nothing but guidance, of which there is none here
OWN_LOOP = [row for row in ROWS if ROWS[row].method != "static" and row != "joint conditional"]


@each((row, name) for row, name in SUPPORTED if row in OWN_LOOP and name in ("sd15", "pixart"))
def test_a_loop_of_one_s_own_is_accelerated_whether_it_takes_tuples_or_objects(row, name):
    latents = []
    for as_object in (False, True):
        pipe = tiny.make(name)
        handle = accelerate(pipe, row)
        pipe.scheduler.set_timesteps(STEPS)
        x = torch.ones(1, 4, 8, 8)
        text = {"encoder_hidden_states": torch.ones(1, 4, 32)}
        if name == "pixart":
            text["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
        for t in pipe.scheduler.timesteps:
            with torch.no_grad():
                out = tiny.denoiser(pipe)(x, timestep=t.expand(1), return_dict=as_object, **text)
            noise = (out.sample if as_object else out[0])[:, :4]
            x = pipe.scheduler.step(noise, t, x, return_dict=False)[0]
        assert (handle.report.computed, handle.report.cached) == (ROWS[row].computed, STEPS - ROWS[row].computed)
        latents.append(x)
    assert torch.equal(*latents)


# DeepCache against an oracle that knows only the published layout of diffusers' UNets


def skip_makers(unet: nn.Module) -> list[nn.Module]:
    """The module whose output is skip connection 0, 1, 2... counted from the outside."""
    makers = [unet.conv_in]
    for block in unet.down_blocks:
        attentions = getattr(block, "attentions", None)
        makers += [attentions[k] if attentions else resnet for k, resnet in enumerate(block.resnets)]
        makers += [*(block.downsamplers or [])]
    return makers


def up_resnets(unet: nn.Module) -> list[nn.Module]:
    """The module that consumes skip connection -1, -2, -3..., in call order."""
    return [resnet for block in unet.up_blocks for resnet in block.resnets]


def watch(module: nn.Module, seen: list[Tensor]) -> None:
    def keep(_module: nn.Module, args: tuple, output) -> None:
        out = output[0] if isinstance(output, tuple) else getattr(output, "sample", output)
        seen.append((args[0].clone(), out.clone()))

    module.register_forward_hook(keep)


@pytest.mark.parametrize(
    ("name", "branch"), [(name, branch) for name in UNETS for branch in range(SKIPS[name] - 1)]
)  # fmt: skip
def test_deepcache_reuses_the_feature_that_enters_the_layer_of_its_skip(name, branch):
    pipe = tiny.make(name)
    unet = pipe.unet
    assert len(skip_makers(unet)) == len(up_resnets(unet)) == SKIPS[name]
    entered, made, inner = [], [], []
    watch(up_resnets(unet)[-1 - branch], entered)
    watch(skip_makers(unet)[branch], made)
    watch(tiny.deepest_leaf(pipe), inner)
    fastdiff.accelerate(pipe, cache={"method": "deepcache", "interval": 2, "branch": branch})
    tiny.run(pipe, "sdxl" if name == "sdxl" else "sd15", steps=4)
    assert len(inner) == 2 and len(entered) == len(made) == 4
    skip_channels = made[0][1].shape[1]
    for step in range(4):
        feature, skip = entered[step][0][:, :-skip_channels], entered[step][0][:, -skip_channels:]
        assert torch.equal(skip, made[step][1]), "the skip connection is this step's own"
        computed = step - step % 2
        assert torch.equal(feature, entered[computed][0][:, :-skip_channels]), "the feature is the last computed one"
    assert not torch.equal(entered[0][0][:, :-skip_channels], entered[2][0][:, :-skip_channels])
    assert not torch.equal(made[0][1], made[1][1])


@pytest.mark.parametrize("name", UNETS)
@pytest.mark.parametrize("beyond", [0, 5])
def test_a_branch_that_the_unet_does_not_have_is_refused(name, beyond):
    pipe = tiny.make(name)
    with pytest.raises(BadConfig, match=f"branches 0 to {SKIPS[name] - 2}"):
        fastdiff.accelerate(pipe, cache={"method": "deepcache", "branch": SKIPS[name] - 1 + beyond})


@pytest.mark.parametrize("branch", [0, 2, 4])
def test_deepcache_keeps_obeying_a_controlnet_at_cached_steps(branch):
    pipe = controlled()
    plain = tiny.run(pipe, "sd15", steps=4, image=control_image(1))
    handle = fastdiff.accelerate(pipe, cache={"method": "deepcache", "interval": 1, "branch": branch})
    assert torch.equal(tiny.run(pipe, "sd15", steps=4, image=control_image(1)), plain)
    handle = fastdiff.accelerate(pipe, cache={"method": "deepcache", "interval": 4, "branch": branch})
    one = tiny.run(pipe, "sd15", steps=4, image=control_image(1))
    two = tiny.run(pipe, "sd15", steps=4, image=control_image(2))
    assert handle.report.cached == 3
    assert not torch.equal(one, two) and torch.isfinite(one).all()


@pytest.mark.parametrize("branch", [0, 4, 9])
def test_deepcache_works_with_freeu(branch):
    """FreeU writes into hidden states in place, also where a cached step holds none."""
    pipe = tiny.make("sd15_two_layers")
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    handle = fastdiff.accelerate(pipe, cache={"method": "deepcache", "interval": 2, "branch": branch})
    assert torch.isfinite(tiny.run(pipe, "sd15", steps=4)).all()
    assert handle.report.cached == 2


@pytest.mark.parametrize("branch", [0, 4, 9])
def test_deepcache_works_with_a_t2i_adapter(branch):
    """The UNet adds the adapter's features in place, also to what a cached step left out."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        adapter = diffusers.T2IAdapter(channels=[8, 16, 16, 16], num_res_blocks=2, downscale_factor=8).eval()
    components = {k: v for k, v in tiny.make("sd15_two_layers").components.items() if k != "image_encoder"}
    pipe = diffusers.StableDiffusionAdapterPipeline(**components, adapter=adapter, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    handle = fastdiff.accelerate(pipe, cache={"method": "deepcache", "interval": 2, "branch": branch})
    one = tiny.run(pipe, "sd15", steps=4, image=control_image(1))
    assert handle.report.cached == 2 and torch.isfinite(one).all()
