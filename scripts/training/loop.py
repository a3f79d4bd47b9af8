"""The loop every stage shares: step-count schedule, EMA, checkpoints to resume from, a progress bar."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, constant, then linear decay over the last `decay` share of `steps`; no wall-clock in it."""

    steps: int
    rate: float
    warmup: int = 100
    decay: float = 0.6

    def __call__(self, step: int) -> float:
        rise = min(1.0, (step + 1) / self.warmup)
        fall = min(1.0, (self.steps - step) / (self.decay * self.steps))
        return self.rate * rise * fall + 1e-5


class Average:
    """Exponential moving average of parameters, with the usual shorter memory at the start."""

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float) -> None:
        self.parameters, self.decay, self.count = list(parameters), decay, 0
        self.values = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        self.count += 1
        decay = min(self.decay, (1 + self.count) / (10 + self.count))
        torch._foreach_lerp_(self.values, [p.detach() for p in self.parameters], 1 - decay)

    @torch.no_grad()
    def copy_to_parameters(self) -> None:
        for parameter, value in zip(self.parameters, self.values, strict=True):
            parameter.copy_(value)


def save_atomically(state: object, path: Path) -> None:
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def train(
    name: str,
    modules: dict[str, nn.Module],
    groups: list[dict],
    loss: Callable[[int], Tensor],
    schedule: Schedule,
    checkpoint: Path,
    *,
    average: float = 0.999,
    gate: Callable[[], str] | None = None,
    gate_every: int = 1000,
) -> None:
    """Minimise `loss(step)`; on return every module holds its averaged weights.

    `groups` are AdamW groups, each with a `scale` on the learning rate. A run that stops goes on from `checkpoint`
    with the same random stream, so it ends where an unbroken run would.
    """
    parameters = [p for group in groups for p in group["params"]]
    optimizer = torch.optim.AdamW(groups, lr=schedule.rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    ema, start, recent = Average(parameters, average), 0, 0.0

    def state(step: int) -> dict:
        return {
            "step": step, "recent": recent, "optimizer": optimizer.state_dict(), "ema": ema.values,
            "ema_count": ema.count, "rng": torch.get_rng_state(), **{k: m.state_dict() for k, m in modules.items()},
        }  # fmt: skip

    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        for key, module in modules.items():
            module.load_state_dict(saved[key])
        optimizer.load_state_dict(saved["optimizer"])
        ema.values, ema.count, start, recent = saved["ema"], saved["ema_count"], saved["step"], saved["recent"]
        torch.set_rng_state(saved["rng"])

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, refresh_per_second=0.5) as bar:
        task = bar.add_task(name, total=schedule.steps, completed=start)
        for step in range(start, schedule.steps):
            for group in optimizer.param_groups:
                group["lr"] = schedule(step) * group["scale"]
            value = loss(step)
            value.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            ema.update()
            recent = value.item() if step == 0 else 0.99 * recent + 0.01 * value.item()
            bar.update(task, advance=1, description=f"{name} loss {recent:.4f}")
            if (step + 1) % gate_every == 0:
                save_atomically(state(step + 1), checkpoint)
                bar.console.print(f"{name} {step + 1}: loss {recent:.4f} {gate() if gate else ''}")
    ema.copy_to_parameters()
