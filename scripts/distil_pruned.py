"""HierarchicalPrune with its training: prunes an embedded model, and teaches what is left by the full one. Adds to
benchmarks/quant-distil.json.

    python scripts/distil_pruned.py --model shapes-unet [--folder build/distil]

Paper: https://arxiv.org/abs/2508.04663. The first blocks are protected: nothing of them is removed, and they are frozen
(positional weight preservation). The others learn at rates by what the plan measured of their parts: a part whose
removal costs more than the median learns by so much slower (sensitivity-guided distillation; the paper goes by
1 / error alone). They learn the full model's output, and what its blocks give. Rows: the full model, pruned, taught so,
and taught as long with all weights alike; all are compared with the full model's pictures of the same seeds. The folder
gets the training pictures, checkpoints to go on from, and what was taught, as a pipeline and a plan:

    fastdiff quantize -m build/distil/shapes-unet -o DIR --set quant.method=w4a16 \\
      --set quant.prune=build/distil/shapes-unet/prune.json
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from measure_cachequant import FOLDER, Study, keep, size_of
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from training.data import latents, training_images
from training.denoiser import Examples
from training.loop import Schedule, train

from fastdiff.anatomy import Anatomy
from fastdiff.bench.measure import draw
from fastdiff.config import Config
from fastdiff.patch import PatchSet
from fastdiff.pipelines.families import anatomies
from fastdiff.pipelines.hearing import hear_each
from fastdiff.quant.components import roots
from fastdiff.quant.prune import PrunePlan
from fastdiff.quant.pruning import prune, within

STEPS = {"shapes-dit": 28, "shapes-unet": 50}


class Lessons:
    """Noisy latents of training scenes with their captions, as arguments of the denoiser."""

    def __init__(self, pipe: Any, folder: Path, scenes: int) -> None:
        self.pipe, self.folder = pipe, folder
        images = training_images(folder / f"images-{scenes}.npy", scenes)
        self.examples = Examples.load(latents(pipe.vae, images, folder / f"latents-{scenes}.pt"))

    @torch.no_grad()
    def batch(self) -> dict[str, Any]:
        index, clean, _, drop = self.examples.pick()
        texts = ["" if gone else self.examples.captions[k] for k, gone in zip(index, drop, strict=True)]
        noise, pipe = torch.randn_like(clean), self.pipe
        if hasattr(pipe, "unet"):
            times = torch.randint(pipe.scheduler.config.num_train_timesteps, (len(clean),))
            context, _ = pipe.encode_prompt(texts, "cpu", 1, False)
            noisy = pipe.scheduler.add_noise(clean, noise, times)
            return {"sample": noisy, "timestep": times, "encoder_hidden_states": context}
        sigma = torch.sigmoid(torch.randn(len(clean)) * 1.1 + 0.2)  # as it was trained
        context, _, pooled, _ = pipe.encode_prompt(texts, None, None, do_classifier_free_guidance=False)
        noisy = torch.lerp(clean, noise, sigma.view(-1, 1, 1, 1))
        told = {"encoder_hidden_states": context, "pooled_projections": pooled}
        return {"hidden_states": noisy, "timestep": sigma * 1000, **told}


@contextmanager
def heard(denoiser: nn.Module, paths: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """What these blocks gave in the last call: of two streams the picture's, which comes last."""
    seen: dict[str, Tensor] = {}

    def ended(path: str, _module: nn.Module, _given: Any, made: Any) -> None:
        seen[path] = [leaf for leaf in pytree.tree_leaves(made) if isinstance(leaf, Tensor)][-1]

    with ExitStack() as hooks:
        for path in paths:
            hooks.enter_context(denoiser.get_submodule(path).register_forward_hook(partial(ended, path)))
        yield seen


def relative(found: Tensor, wanted: Tensor) -> Tensor:
    return (found - wanted).square().mean() / wanted.square().mean()


def by_sensitivity(plan: PrunePlan, anatomy: Anatomy) -> list[dict[str, Any]]:
    """Groups for the optimizer: parameters of blocks that are not protected, each with its part of the rate. What
    cannot be left out has no sensitivity and learns at the whole rate; what is in no block does not learn."""
    errors: dict[str, float] = {}
    for row in plan.measured:  # parts come before a transformer block, which has their names
        for path in row.component.split(" + "):
            errors.setdefault(path, row.error)
    removed = [removal.path for removal in plan.removed]
    learning = [path for path in errors if not within(path, (*removed, *plan.protected))]
    usual = statistics.median(errors[path] for path in learning)
    groups: dict[float, list[nn.Parameter]] = {}
    for block in (path for path, _ in roots(anatomy) if path not in plan.protected):
        for name, parameter in anatomy.denoiser.get_submodule(block).named_parameters(prefix=block):
            part = max((path for path in learning if within(name, [path])), key=len, default=None)
            groups.setdefault(1.0 if part is None else min(1.0, usual / errors[part]), []).append(parameter)
    return [{"params": parameters, "scale": scale} for scale, parameters in groups.items()]


def teach(
    name: str, plan: PrunePlan, anatomy: Anatomy, teacher: nn.Module, lessons: Lessons, groups: list[dict[str, Any]],
    steps: int, rate: float,
) -> None:  # fmt: skip
    """The denoiser's output, and the mean over its blocks of what they give: relative squared errors."""
    denoiser = anatomy.denoiser.requires_grad_(False)
    for group in groups:
        for parameter in group["params"]:
            parameter.requires_grad_(True)
    removed = [removal.path for removal in plan.removed]
    blocks = [path for path, _ in roots(anatomy) if path not in (*plan.protected, *removed)]
    torch.manual_seed(3)
    with heard(denoiser, blocks) as ours, heard(teacher, blocks) as theirs:

        def loss(_step: int) -> Tensor:
            given = lessons.batch()
            with torch.no_grad():
                wanted = teacher(**given).sample
            output = relative(denoiser(**given).sample, wanted)
            return output + torch.stack([relative(ours[path], theirs[path]) for path in blocks]).mean()

        checkpoint = lessons.folder / f"{name}.pt"
        train(
            name, {"denoiser": denoiser}, groups, loss, Schedule(steps, rate), checkpoint, average=0.99, gate_every=250
        )
    denoiser.requires_grad_(False)


def times_as_fast(study: Study, teacher: nn.Module, rounds: int = 5) -> float:
    """CPU seconds of the full model's picture over those of this one, in turns; the median of the rounds."""
    full, ratios = copy.copy(study.pipe), []
    setattr(full, anatomies(study.pipe)[0].component, teacher)
    for k in range(rounds):
        seconds = []
        for pipe in (full, study.pipe):
            begun = time.process_time()
            draw(pipe, [study.asked[k].caption], [k], study.steps, 3.0)
            seconds.append(time.process_time() - begun)
        ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios)


def add(study: Study, name: str, quant: str | None, told: dict[str, Any]) -> None:
    """The row of the denoiser as it is now, with a scheme or without."""
    config = Config(quant=None if quant is None else {"method": quant, "speed": "smallest"})
    count = sum(parameter.numel() for parameter in study.denoiser.parameters())
    extra = {"parameters": count, "denoiser_mb": round(size_of(study, config) / 1e6, 2), **told}
    keep(FOLDER / "quant-distil.json", study.row(name + (f" + {quant}" if quant else ""), config, extra), study.pipe)


def main(
    model: Annotated[str, typer.Option(help="shapes-unet or shapes-dit")] = "shapes-unet",
    prune_error: Annotated[float, typer.Option(help="what removing may cost, as quant.prune")] = 0.2,
    protect: Annotated[float, typer.Option(help="share of the first blocks, as quant.protect")] = 0.3,
    steps: Annotated[int, typer.Option(min=1, help="steps of learning, each of 16 pictures")] = 1000,
    rate: Annotated[float, typer.Option(help="the highest rate")] = 5e-4,
    alike: Annotated[bool, typer.Option(help="teach once more, with all weights alike")] = True,
    scenes: Annotated[int, typer.Option(min=16, help="training pictures")] = 4000,
    captions: Annotated[int, typer.Option(min=8, help="held-out captions, one picture each")] = 64,
    folder: Annotated[Path, typer.Option()] = Path("build/distil"),
) -> None:
    """Prune, teach and measure."""
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    study = Study(model, STEPS[model], captions, 8, 8)
    anatomy, patches = anatomies(study.pipe)[0], PatchSet()
    teacher = copy.deepcopy(anatomy.denoiser).requires_grad_(False)
    add(study, "float", None, {})
    (calls,) = hear_each(study.pipe, study.prompts, batch=4, **study.call).values()
    plan = prune(calls, max_error=prune_error**2, protect=protect)
    plan.install(anatomy, patches.replace)
    told = {"removed": [removal.path for removal in plan.removed], "protected": list(plan.protected)}
    told["times_as_fast"] = round(times_as_fast(study, teacher), 3)
    add(study, "pruned", None, told)
    pruned, lessons = copy.deepcopy(anatomy.denoiser.state_dict()), Lessons(study.pipe, folder, scenes)
    for name in ("taught", *(["taught, all alike"] if alike else [])):
        anatomy.denoiser.load_state_dict(pruned)
        whole = [{"params": list(anatomy.denoiser.parameters()), "scale": 1.0}]
        groups = whole if name.endswith("alike") else by_sensitivity(plan, anatomy)
        share = sum(p.numel() for group in groups for p in group["params"]) / sum(map(torch.numel, whole[0]["params"]))
        begun = time.process_time()
        teach(f"{model}, {name}", plan, anatomy, teacher, lessons, groups, steps, rate)
        learned = {"steps_taught": steps, "cpu_seconds_taught": round(time.process_time() - begun)}
        learned["share_that_learns"] = round(share, 4)
        add(study, name, None, told | learned)
        if name == "taught":
            add(study, name, "w4a16", told | learned)
            patches.restore()
            study.pipe.save_pretrained(folder / model)
            (folder / model / "prune.json").write_text(plan.model_dump_json(), encoding="utf-8")
            plan.install(anatomy, patches.replace)


if __name__ == "__main__":
    typer.run(main)
