"""What is put on a pipeline once it is loaded: LoRA, a scheduler, other inputs, a place to wait, tiles."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors import safe_open

from fastdiff.errors import BackendUnavailable, BadConfig, BadModel, UnknownName, UnsupportedModel

from .inputs import fitting
from .parts import denoisers
from .solving import schedulers
from .sources import PICKLES, check_weights, first_line

OFFLOADS = ("none", "model", "group", "layers")
_OURS = "fastdiff_"  # begins the names of the adapters that are taken off again
_RAW = "base_model.model."  # in names that are peft's own, which need not say of which component they are


@dataclass(frozen=True)
class Outfit:
    """Checked before a model is loaded, put on after it. Each field is an argument of `load`."""

    lora: tuple[str, ...] = ()
    scheduler: str | None = None
    inputs: frozenset[str] = frozenset()
    controlnet: str | None = None
    offload: str = "none"
    vae_tiling: bool = False

    def check(self, device: str) -> None:
        """Raises BadConfig, BadModel or BackendUnavailable for what no model can do."""
        for text in self.lora:
            _check_lora(lora_of(text)[0])
        if self.lora and find_spec("peft") is None:
            raise BackendUnavailable("LoRA needs peft: pip install 'fastdiff[lora]'")
        if self.scheduler is not None and not self._is_class:
            schedulers.check_name(self.scheduler)
        if self.offload not in OFFLOADS:
            raise UnknownName("--offload", self.offload, OFFLOADS)
        if self.offload != "none" and device.startswith("cpu"):
            raise BadConfig(f"--offload {self.offload} moves weights between a GPU and the CPU; there is no GPU here")

    @property
    def _is_class(self) -> bool:
        return str(self.scheduler).endswith("Scheduler") and hasattr(diffusers, str(self.scheduler))

    def put_on(self, pipe: Any, device: str) -> Any:
        """The pipeline on its device, or one with its components that takes other inputs."""
        pipe = fitting(pipe, self.inputs, self.controlnet)
        if self.lora:
            wear(pipe, self.lora)
        if self.scheduler is not None:
            pipe.scheduler = self._scheduler(pipe)
        if self.vae_tiling:
            if not hasattr(getattr(pipe, "vae", None), "enable_tiling"):
                raise UnsupportedModel(f"{type(pipe).__name__} has no VAE that works in tiles; leave --vae-tiling out")
            pipe.vae.enable_tiling()
        return self._placed(pipe, device)

    def _scheduler(self, pipe: Any) -> Any:
        name, own = str(self.scheduler), pipe.scheduler
        if not self._is_class:
            return schedulers.solver(name, own)
        known = [kind.__name__ for kind in getattr(own, "compatibles", [])]
        if name not in (*known, type(own).__name__):
            also = f"; classes that go with it: {', '.join(sorted(known))}" if known else "; take a short name"
            raise BadConfig(f"scheduler {name} does not solve what {type(own).__name__} does{also}")
        return getattr(diffusers, name).from_config(own.config)

    def _placed(self, pipe: Any, device: str) -> Any:
        try:
            if self.offload == "model":
                pipe.enable_model_cpu_offload(device=device)
            elif self.offload == "layers":
                pipe.enable_sequential_cpu_offload(device=device)
            elif self.offload == "group":
                pipe.enable_group_offload(torch.device(device), num_blocks_per_group=1, use_stream=True)
            else:
                return pipe.to(device)
        except (ValueError, NotImplementedError) as error:
            raise UnsupportedModel(f"{type(pipe).__name__} cannot be offloaded: {first_line(error)}") from error
        return pipe


def lora_of(text: str) -> tuple[Path, float]:
    """File and scale of `FILE[:scale]`. Raises BadConfig for a scale that is no number."""
    name, colon, tail = text.rpartition(":")
    if not colon or Path(text).expanduser().is_file():
        return Path(text).expanduser(), 1.0
    try:
        return Path(name).expanduser(), float(tail)
    except ValueError:
        raise BadConfig(f"--lora {text}: {tail!r} is no scale; give FILE or FILE:0.8") from None


def wear(pipe: Any, loras: Sequence[str]) -> None:
    """Have exactly these LoRA on, `FILE[:scale]`, in the place of those that were put on like this before; between two
    calls of an accelerated pipeline, too: what it caches lasts no longer than a call.

    Raises BadModel for a file that is none for this model, UnsupportedModel for a pipeline that takes none.
    """
    if not hasattr(pipe, "load_lora_weights"):
        raise UnsupportedModel(f"{type(pipe).__name__} takes no LoRA; leave --lora out")
    held = {name for names in pipe.get_list_adapters().values() for name in names}
    wanted: dict[str, float] = {}
    for text in loras:
        file, scale = lora_of(text)
        _check_lora(file)
        name = _name(file)
        if name not in held:
            _put(pipe, file, name)
        wanted[name] = scale * _own_scale(file)
    gone = [name for name in held if name.startswith(_OURS) and name not in wanted]
    if gone and {*held} == {*gone} and not wanted:
        pipe.unload_lora_weights()
        return
    if gone:
        pipe.delete_adapters(gone)
    if others := [name for name in held if not name.startswith(_OURS)]:
        raise UnsupportedModel(f"the pipeline wears other adapters ({', '.join(others)}); set their scales yourself")
    if wanted:
        pipe.set_adapters(list(wanted), list(wanted.values()))


def _put(pipe: Any, file: Path, name: str) -> None:
    try:
        pipe.load_lora_weights(_tensors(file, pipe), adapter_name=name)
    except Exception as error:
        raise BadModel(f"{str(file)!r} is no LoRA for this {type(pipe).__name__}: {first_line(error)}") from error
    if name not in {one for names in pipe.get_list_adapters().values() for one in names}:
        raise BadModel(f"{str(file)!r} is no LoRA for this {type(pipe).__name__}: it names none of its layers")


def _tensors(file: Path, pipe: Any) -> Any:
    """The file, or the tensors of peft's own names as diffusers names them."""
    with safe_open(file, framework="pt") as opened:
        keys = list(opened.keys())
        if not any(_RAW in key for key in keys):
            return str(file)
        part = f"{next(iter(denoisers(pipe)))}."
        named = {key: (part if key.startswith(_RAW) else "") + key.replace(_RAW, "") for key in keys}
        return {name: opened.get_tensor(key) for key, name in named.items()}


def _own_scale(file: Path) -> float:
    """alpha / r, which peft keeps in a file beside the one that it saved."""
    config = file.with_name("adapter_config.json")
    if file.name != "adapter_model.safetensors" or not config.is_file():
        return 1.0
    told = json.loads(config.read_text(encoding="utf-8"))
    return float(told["lora_alpha"]) / float(told["r"])


def _name(file: Path) -> str:
    """Of a file as it is now: written again, it is another one."""
    stat = file.stat()
    text = f"{file.resolve()} {stat.st_mtime_ns} {stat.st_size}"
    return _OURS + hashlib.sha256(text.encode()).hexdigest()[:16]


def _check_lora(file: Path) -> None:
    if file.suffix in PICKLES:
        raise BadModel(f"LoRA {str(file)!r} is a pickle, which can run code when read; convert it to safetensors")
    if not file.is_file():
        raise BadModel(f"LoRA file {str(file)!r} does not exist")
    if file.suffix != ".safetensors":
        raise BadModel(f"LoRA {str(file)!r} is no .safetensors file")
    check_weights(file)
