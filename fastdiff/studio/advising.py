"""What a model needs and which levers to pull, from its structure alone: nothing is computed, no weights are read."""

from __future__ import annotations

import contextlib
import inspect
import json
import math
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fastdiff.anatomy import Anatomy
from fastdiff.errors import FastdiffError, UnsupportedModel
from fastdiff.parallel.planner import alone, attempt, candidates, halves
from fastdiff.parallel.rehearsal import Tally
from fastdiff.patch import PatchSet
from fastdiff.pipelines.accelerate import resolve_for
from fastdiff.pipelines.families import denoisers
from fastdiff.pipelines.loading import call_defaults
from fastdiff.pipelines.plan import device_memory, observe
from fastdiff.pipelines.quantized_parts import empty, is_quantized, type_of
from fastdiff.pipelines.single_files import is_file
from fastdiff.pipelines.sources import source
from fastdiff.weights import nbytes

from .drawing import opened
from .holding import first_step
from .pictures import usual_sides

_SLACK = 1.15  # allocators, kernels' workspaces and what torch itself takes
_BITS = {"w8a16": 8.5, "w4a16": 4.5}  # bits of a weight, with the scales of its groups
_TILE = 0.25  # of a decode in tiles; a tile is 512 x 512 of pixels in the VAEs of diffusers


@dataclass(frozen=True)
class Needs:
    """Bytes: of each part's weights; of a step, of a decode (None: not counted) and of what a cache holds."""

    weights: dict[str, int]
    denoisers: tuple[str, ...]
    step: int
    decode: int | None
    cache: int
    largest_block: int

    def total(self, fit: Fit) -> int:
        """The most bytes at a time."""
        weights = {name: size * fit.scale if name in self.denoisers else size for name, size in self.weights.items()}
        if fit.offload == "none":
            held = {name: sum(weights.values()) for name in weights}
        elif fit.offload == "model":
            held = weights
        else:
            held = dict.fromkeys(weights, 2 * self.largest_block * fit.scale)
        decode = (self.decode or 0) * (_TILE if fit.tiling else 1)
        at_step = max((held[name] for name in self.denoisers), default=0) + self.step + self.cache
        return round(_SLACK * max(at_step, held.get("vae", 0) + decode, max(held.values())))


@dataclass(frozen=True)
class Fit:
    """Ways to need less, from none that costs anything to the slowest."""

    offload: str = "none"
    quant: str | None = None
    tiling: bool = False

    @property
    def scale(self) -> float:
        """Of a denoiser's weights in 16 bits."""
        return 1.0 if self.quant is None else _BITS[self.quant] / 16

    @property
    def flags(self) -> list[str]:
        found = [] if self.offload == "none" else ["--offload", self.offload]
        found += ["--vae-tiling"] if self.tiling else []
        small = f"--set quant.method={self.quant} --set quant.speed=smallest"
        return found + (small.split() if self.quant else [])


FITS = [
    Fit(offload, quant, tiling)
    for offload, quant in (
        ("none", None), ("none", "w8a16"), ("model", None), ("model", "w8a16"), ("none", "w4a16"), ("model", "w4a16"),
        ("group", None), ("layers", None),
    )
    for tiling in (False, True)
]  # fmt: skip


@dataclass(frozen=True)
class Lever:
    """Flags for `generate`, what they bring, and what was done to find that out."""

    name: str
    flags: list[str]
    why: str


@dataclass(frozen=True)
class Advice:
    model: str
    pipeline: str
    dtype: str
    size: tuple[int, int] | None
    memory: int
    needs: Needs
    fit: Fit | None
    total: int
    levers: list[Lever] = field(default_factory=list)

    @property
    def command(self) -> str:
        words = ["fastdiff", "generate", "PROMPT", "-m", self.model]
        words += [] if self.dtype == "float32" else ["--dtype", self.dtype]
        flags = [*(self.fit.flags if self.fit else []), *(word for lever in self.levers for word in lever.flags)]
        return shlex.join([*words, *flags])

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"fits": self.fit is not None, "command": self.command}


def advise(
    model: str, *, memory: float | None = None, devices: int = 1, link: float | None = None, size: int | None = None,
    dtype: torch.dtype | None = None,
) -> Advice:  # fmt: skip
    """What `model` needs on a device of `memory` bytes, by default this machine's, and what to do about it.

    devices, link: of those that share a picture, and the bytes a second between them. Raises UnsupportedModel for a
    pipeline that draws nothing from a prompt.
    """
    here = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = memory is not None or here.type == "cuda"
    dtype = dtype or (torch.bfloat16 if on_gpu else torch.float32)
    pipe, stored = skeleton(model, dtype)
    anatomy, calls = _first_step(pipe, size)
    config: Any = resolve_for(pipe, "balanced", {}, anatomy).config
    sides = usual_sides(pipe) if size is None else (size, size)
    blocks = [block for part in anatomy.denoiser.children() if isinstance(part, nn.ModuleList) for block in part]
    steps = max(call_defaults(pipe).get("num_inference_steps") or 50, 2)
    needs = Needs(
        stored, tuple(denoisers(pipe)), alone(anatomy, calls).held, _decode(pipe, sides),
        0 if config.cache is None else max(first_step(config.cache, anatomy, calls, steps)),
        max(map(nbytes, blocks), default=nbytes(anatomy.denoiser)),
    )  # fmt: skip
    room = memory or device_memory(here, 1)
    ways = [fit for fit in FITS if fit.offload == "none" or on_gpu]
    fit = next((fit for fit in ways if needs.total(fit) <= room), None)
    levers = [*_cached(anatomy, config.cache), *_shared(anatomy, calls, devices, link)]
    if on_gpu and devices == 1 and (fit is None or fit.offload == "none"):
        levers.append(Lever("compile", ["--set", "compile.enabled=true"], "one graph a block; the first call compiles"))
    return Advice(
        model, type(pipe).__name__, str(dtype).removeprefix("torch."), sides, round(room), needs, fit,
        needs.total(fit or ways[-1]), levers,
    )  # fmt: skip


def skeleton(model: str, dtype: torch.dtype) -> tuple[Any, dict[str, int]]:
    """A pipeline without weights, and the bytes of each part's, or of its files where another library quantized it."""
    folder = None if is_file(model) else Path(source(model))
    stored: dict[str, int] = {}
    if folder is None or not folder.is_dir() or is_quantized(folder):
        pipe = opened(model, dtype)
        stored = {name: nbytes(part) for name, part in pipe.components.items() if isinstance(part, nn.Module)}
        return pipe, stored
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    parts: dict[str, Any] = {}
    for name, entry in index.items():
        if isinstance(entry, list) and len(entry) == 2:
            parts[name] = None if entry[0] is None else _part(folder, name, *entry)
            config = folder / name / "config.json"
            if isinstance(parts[name], nn.Module) and '"quantization_config"' in config.read_text(encoding="utf-8"):
                stored[name] = sum(file.stat().st_size for file in (folder / name).glob("*.safetensors"))
    options = {name: value for name, value in index.items() if not name.startswith("_") and name not in parts}
    kind = getattr(diffusers, index["_class_name"])
    known = inspect.signature(kind.__init__).parameters
    pipe = kind(**{name: part for name, part in (parts | options).items() if name in known})
    pipe.set_progress_bar_config(disable=True)
    for name, part in parts.items():
        if isinstance(part, nn.Module):
            _of_zeros(part, dtype)
            stored.setdefault(name, nbytes(part))
    return pipe, stored


def _of_zeros(part: nn.Module, dtype: torch.dtype) -> None:
    """Weights that are all one zero, on the CPU: they take no memory, and what reads values finds some."""
    places = [(module, name, weight, f"{path}.{name}") for path, module in part.named_modules()
              for name, weight in module.named_parameters(recurse=False)]  # fmt: skip
    made: dict[int, nn.Parameter] = {}  # a weight in two places stays one
    for module, name, weight, path in places:
        kind = type_of(path, part, dtype) if weight.is_floating_point() else weight.dtype
        zeros = torch.zeros((), dtype=kind).expand(weight.shape)
        setattr(module, name, made.setdefault(id(weight), nn.Parameter(zeros, requires_grad=False)))


class _Unmultiplied(TorchFunctionMode):
    """Layers give zeros: multiplying with the weights of a text encoder, all zero, would only take its time."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            return args[0].new_zeros(*args[0].shape[:-1], len(args[1]))
        return func(*args, **(kwargs or {}))


def _on_meta(tree: Any) -> Any:
    return pytree.tree_map(lambda leaf: leaf.to("meta") if isinstance(leaf, torch.Tensor) else leaf, tree)


def _part(folder: Path, name: str, library: str, class_name: str) -> Any:
    home: Any = {"diffusers": diffusers, "transformers": transformers}.get(library)
    kind = getattr(home, class_name, None)
    if kind is None:  # a part of one pipeline's own, such as a checker of pictures
        return None
    if issubclass(kind, nn.Module):
        made = empty(folder / name, library, class_name).eval()
        if library == "transformers":
            made.tie_weights()  # type: ignore[operator]
        return made
    return kind.from_pretrained(folder / name)


def _first_step(pipe: Any, size: int | None) -> tuple[Anatomy, Sequence[Any]]:
    """The denoiser on the meta device, and the arguments of its calls in a step."""

    def zeros(leaf: Any) -> Any:
        return torch.zeros(leaf.shape, dtype=leaf.dtype) if isinstance(leaf, torch.Tensor) else leaf

    def shapes_only(forward: Any) -> Any:
        def sketched(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = _on_meta((args, kwargs))
            return pytree.tree_map(zeros, forward(*args, **kwargs))

        return sketched

    try:
        with PatchSet() as patches, _Unmultiplied():
            for denoiser in denoisers(pipe).values():
                denoiser.to("meta")
                patches.wrap_forward(denoiser, shapes_only)
            anatomy, calls, _ = observe(pipe, size)
            patches.restore()
    except FastdiffError:
        raise
    except Exception as error:  # what a pipeline does with values that are not there
        raise UnsupportedModel(
            f"{type(pipe).__name__} does not run without weights ({str(error).splitlines()[0]}); what it needs cannot "
            "be counted"
        ) from error
    pipe.to("meta")
    return anatomy, _on_meta(calls)


def _decode(pipe: Any, sides: tuple[int, int] | None) -> int | None:
    """Bytes of decoding one picture; None of a VAE that takes something else."""
    vae: Any = getattr(pipe, "vae", None)
    channels = getattr(getattr(vae, "config", None), "latent_channels", None)
    if sides is None or channels is None:
        return None
    scale = getattr(pipe, "vae_scale_factor", 8)
    latents = torch.empty(1, channels, math.ceil(sides[1] / scale), math.ceil(sides[0] / scale), device="meta",
                          dtype=next(vae.parameters()).dtype)  # fmt: skip
    try:
        with torch.no_grad(), Tally(vae, []) as tally:
            vae.decode(latents)
    except Exception:  # a VAE of videos or packed latents
        return None
    return tally.peak


def _cached(anatomy: Anatomy, cache: Any) -> Iterator[Lever]:
    with contextlib.suppress(FastdiffError):
        if cache is None or not cache.places(anatomy):
            return
        yield Lever(
            "cache", ["--preset", "balanced"],
            f"{cache.method}, the preset of this family, leaves out parts of most steps; look with --compare, try fast",
        )  # fmt: skip


def _shared(anatomy: Anatomy, calls: Sequence[Any], devices: int, link: float | None) -> Iterator[Lever]:
    """The parallel method with the least to wait for; of those that change nothing, where there is one."""
    if devices < 2 or link is None:
        return
    one, usable = alone(anatomy, calls), []
    for method in candidates(devices, halves(calls)):
        try:
            usable.append(attempt(anatomy, calls, method, devices, one))
        except RuntimeError:  # it reads values of the calls, which are not there
            continue
    usable = [trial for trial in usable if trial.reason is None and trial.played]
    usable = [trial for trial in usable if trial.method.fresh(10_000) and trial.mesh.step == 1] or usable
    if not usable:
        return
    most = {id(trial): max(sum(map(rank.stale.bytes_of, (True, False))) for rank in trial.played) for trial in usable}
    best = min(usable, key=lambda trial: most[id(trial)])
    sent = most[id(best)]
    settings = best.method.model_dump(exclude_defaults=True, exclude={"devices"}) | {"method": best.method.method}
    flags = [word for key, value in settings.items() for word in ("--set", f"parallel.{key}={value}")]
    yield Lever(
        "parallel", ["--devices", str(devices), *flags],
        f"{settings['method']}: {sent / 1e6:.3g} MB a step and device, {sent / link * 1e3:.3g} ms on this "
        "link; fastdiff plan measures the rest",
    )  # fmt: skip
