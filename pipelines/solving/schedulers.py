"""Schedulers by short names, set up to solve the very ODE of a pipeline's own scheduler."""

from __future__ import annotations

import inspect
import re
from typing import Any

import numpy as np
import torch

from fastdiff.errors import BadConfig, UnknownName
from fastdiff.listening import unheard

from .levels import put

_TITLES = {
    "ddim": "DDIM", "dpm++": "DPM++ 2M", "unipc": "UniPC", "deis": "DEIS", "euler": "Euler",
    "flowmatch": "flow-matching Euler",
}  # fmt: skip
_CLASSES = {
    "ddim": "DDIMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "deis": "DEISMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "flowmatch": "FlowMatchEulerDiscreteScheduler",
}
_TABLES = {"ays": "StableDiffusionTimesteps", "aysxl": "StableDiffusionXLTimesteps"}  # of diffusers' AysSchedules


def check_name(name: str) -> None:
    """Raises UnknownName; needs no model."""
    kind, _, grid = name.partition("@")
    if kind not in _CLASSES or not re.fullmatch(r"|karras|ays(xl)?|shift[0-9.]+", grid):
        raise UnknownName("scheduler", name, [*_CLASSES, "unipc@karras", "unipc@ays", "unipc@shift2"])


def title(name: str) -> str:
    """What people call it."""
    kind, _, grid = name.partition("@")
    return f"{_TITLES[kind]} {grid.replace('shift', 'shift ').replace('ays', 'AYS ')}".strip()


def solver(name: str, scheduler: Any) -> Any:
    """A new scheduler of the named kind with the noise schedule and the prediction type of `scheduler`; `@karras`,
    `@ays`, `@aysxl` or, of a flow, `@shift2` after the name is another grid.

    Raises BadConfig where that kind cannot solve the same ODE.
    """
    import diffusers

    check_name(name)
    name, _, grid = name.partition("@")
    flow = _is_flow(scheduler)
    if grid and flow is not grid.startswith("shift"):
        raise BadConfig(f"{grid} is no grid of {'flow matching' if flow else 'a noise schedule in timesteps'}")
    if grid in _TABLES and name == "ddim":
        raise BadConfig(f"ddim takes evenly spaced timesteps only; take dpm++@{grid}, unipc@{grid} or deis@{grid}")
    if flow and name == "euler":
        name = "flowmatch"
    if flow and name == "ddim":
        raise BadConfig("ddim does not solve flow-matching models; take flowmatch, dpm++ or unipc")
    if not flow and name == "flowmatch":
        raise BadConfig("flowmatch solves flow-matching models only; take ddim, dpm++, unipc or euler")
    options = _options(name, scheduler, flow)
    if grid == "karras":
        options |= {"use_karras_sigmas": True}
    elif grid.startswith("shift"):
        options |= {"shift" if name == "flowmatch" else "flow_shift": float(grid.removeprefix("shift"))}
    kind = getattr(diffusers, _CLASSES[name])
    return (_aligned(kind, _TABLES[grid]) if grid in _TABLES else kind).from_config(scheduler.config, **options)


def _aligned(kind: Any, table: str) -> Any:
    """A class of schedulers on the published grid of Align Your Steps, https://arxiv.org/abs/2404.14507: ten steps,
    and between them, for other numbers, even in log sigma, as its authors do."""
    from diffusers.schedulers import AysSchedules

    times = [*AysSchedules[table], 0]  # type: ignore[misc]

    def set_timesteps(self: Any, num_inference_steps: int, device: Any = None, **_: Any) -> None:
        kind.set_timesteps(self, num_inference_steps, device=device)
        known = np.log(((1 - self.alphas_cumprod) / self.alphas_cumprod).sqrt().numpy())
        ten = np.linspace(0, num_inference_steps, len(times))
        sigmas = np.interp(np.arange(num_inference_steps), ten, known[times])
        places = 1 - np.interp(sigmas, known, np.linspace(0, 1, len(known)))
        put(self, [*places.tolist(), 1.0], device=device)

    return type(kind.__name__, (kind,), {"set_timesteps": set_timesteps, "__module__": kind.__module__})


def _options(name: str, scheduler: Any, flow: bool) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if name == "dpm++":
        options = {"algorithm_type": "dpmsolver++", "solver_order": 2}
    if not flow:
        return options | _end(name, scheduler)
    if scheduler.config.get("use_dynamic_shifting"):
        raise BadConfig(f"{name} is not set up for a shift that depends on the resolution")
    shift = scheduler.config.get("shift", scheduler.config.get("flow_shift", 1.0))
    if name == "flowmatch":
        return {"shift": shift}
    return options | {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": shift}


def _end(name: str, own: Any) -> dict[str, Any]:
    """Stop at the same noise level; DDIM and the others have different words for it, lost by `from_config`."""
    config = own.config
    # what another class left behind in the config says nothing
    if "set_alpha_to_one" in config and _takes(own, "set_alpha_to_one"):
        clean = config["set_alpha_to_one"]
    elif "final_sigmas_type" in config:
        clean = config["final_sigmas_type"] == "zero"
    else:
        return {}
    return {"set_alpha_to_one": clean} if name == "ddim" else {"final_sigmas_type": "zero" if clean else "sigma_min"}


def _takes(own: Any, key: str) -> bool:
    """Whether a setting is the scheduler's own, and not left in its config by another class."""
    return key in inspect.signature(type(own).__init__).parameters


def _is_flow(scheduler: Any) -> bool:
    return type(scheduler).__name__.startswith("FlowMatch") or bool(scheduler.config.get("use_flow_sigmas"))


def host(own: Any) -> Any:
    """A scheduler of one evaluation a step, linear in the model's outputs, that takes any noise levels and solves the
    ODE of a pipeline's own: FlowMatchEuler of a flow, else DPM-Solver++(2M).

    Raises BadConfig for a scheduler that adds noise, clips what the model predicts, or has another ODE than these.
    """
    name, config = type(own).__name__, own.config
    for key in ("thresholding", "clip_sample"):
        if _takes(own, key) and config.get(key):
            raise BadConfig(f"{name} clips each prediction ({key}), which no weights can stand for; turn it off")
    if config.get("invert_sigmas") or "Inverse" in name or config.get("timestep_type") == "continuous":
        raise BadConfig(f"{name}, as it is set up, has other noise levels than those that a solver is fitted at")
    if _adds_noise(own):
        raise BadConfig(
            f"{name} adds noise of its own, so that there is no picture to converge to; give the pipeline a "
            "deterministic scheduler such as DPM++, UniPC, DDIM or Euler"
        )
    if name == "FlowMatchEulerDiscreteScheduler":
        return unheard(own)
    if not hasattr(own, "alphas_cumprod") and not _is_flow(own):
        raise BadConfig(f"{name} has neither a noise schedule in timesteps nor flow matching; no solver can be fitted")
    made = solver("flowmatch" if _is_flow(own) else "dpm++", own)
    if not _is_flow(own) and not torch.allclose(made.alphas_cumprod.double(), own.alphas_cumprod.double(), rtol=1e-3):
        raise BadConfig(f"{name} changes its noise schedule as DPM++ does not; no solver can be fitted to it")
    return made


def ode(own: Any) -> str:
    """What a plan's weights depend on of a scheduler: what the model predicts, and the noise schedule."""
    if _is_flow(own):
        return "flow matching"
    kept = own.alphas_cumprod
    marks = ", ".join(f"{float(kept[k]):.4g}" for k in (0, len(kept) // 2, len(kept) - 1))
    return f"{own.config.get('prediction_type', 'epsilon')}, signal {marks}"


def _adds_noise(scheduler: Any) -> bool:
    """Whether the same steps, taken twice, end in other latents."""
    kind, config = type(scheduler).__name__, scheduler.config
    if "SDE" in kind or "sde" in str(config.get("algorithm_type")) or config.get("stochastic_sampling"):
        return True
    ends = []
    with torch.random.fork_rng(devices=[]):
        for seed in (0, 1):
            torch.manual_seed(seed)
            try:
                ends.append(_stepped(unheard(scheduler)))
            except (TypeError, IndexError, AttributeError, ValueError):
                raise BadConfig(f"the steps of {kind} are not those of a solver; no weights can stand for it") from None
    return not torch.equal(*ends)


def _stepped(own: Any) -> torch.Tensor:
    """Latents after two steps of no output at all."""
    own.set_timesteps(4, **({"mu": 1.0} if own.config.get("use_dynamic_shifting") else {}))
    latents = torch.ones(1, 1, 2, 2)
    for timestep in own.timesteps[:2]:
        if hasattr(own, "scale_model_input"):
            own.scale_model_input(latents, timestep)
        latents = own.step(torch.zeros_like(latents), timestep, latents, return_dict=False)[0]
    return latents
