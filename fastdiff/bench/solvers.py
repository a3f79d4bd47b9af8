"""Schedulers by short names, set up to solve the very ODE of a pipeline's own scheduler."""

from __future__ import annotations

from typing import Any

from fastdiff.errors import BadConfig, UnknownName

TITLES = {"ddim": "DDIM", "dpm++": "DPM++ 2M", "unipc": "UniPC", "euler": "Euler", "flowmatch": "flow-matching Euler"}
_CLASSES = {
    "ddim": "DDIMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "flowmatch": "FlowMatchEulerDiscreteScheduler",
}


def check_name(name: str) -> None:
    """Raises UnknownName; needs no model."""
    if name not in _CLASSES:
        raise UnknownName("scheduler", name, _CLASSES)


def solver(name: str, scheduler: Any) -> Any:
    """A new scheduler of the named kind with the noise schedule and the prediction type of `scheduler`.

    Raises BadConfig where that kind cannot solve the same ODE.
    """
    import diffusers

    check_name(name)
    flow = _is_flow(scheduler)
    if flow and name == "euler":
        name = "flowmatch"
    if flow and name == "ddim":
        raise BadConfig("ddim does not solve flow-matching models; take flowmatch, dpm++ or unipc")
    if not flow and name == "flowmatch":
        raise BadConfig("flowmatch solves flow-matching models only; take ddim, dpm++, unipc or euler")
    return getattr(diffusers, _CLASSES[name]).from_config(scheduler.config, **_options(name, scheduler, flow))


def _options(name: str, scheduler: Any, flow: bool) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if name == "dpm++":
        options = {"algorithm_type": "dpmsolver++", "solver_order": 2}
    if not flow:
        return options | _end(name, scheduler.config)
    if scheduler.config.get("use_dynamic_shifting"):
        raise BadConfig(f"{name} is not set up for a shift that depends on the resolution")
    shift = scheduler.config.get("shift", scheduler.config.get("flow_shift", 1.0))
    if name == "flowmatch":
        return {"shift": shift}
    return options | {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": shift}


def _end(name: str, config: Any) -> dict[str, Any]:
    """Stop at the same noise level; DDIM and the others have different words for it, lost by `from_config`."""
    if "set_alpha_to_one" in config:
        clean = config["set_alpha_to_one"]
    elif "final_sigmas_type" in config:
        clean = config["final_sigmas_type"] == "zero"
    else:
        return {}
    return {"set_alpha_to_one": clean} if name == "ddim" else {"final_sigmas_type": "zero" if clean else "sigma_min"}


def _is_flow(scheduler: Any) -> bool:
    return type(scheduler).__name__.startswith("FlowMatch") or bool(scheduler.config.get("use_flow_sigmas"))
