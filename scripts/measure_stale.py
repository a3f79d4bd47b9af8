"""When displaced values may be old, what codes them, and which steps may be guessed: quality against bytes.

One process plays all ranks: in every self-attention the picture's keys and values are cut into the parts of so many
ranks, and each part's queries see their own, and of the others what would have come over the wire. Borders and
statistics of the UNet are those of the whole picture: of it this is attention alone. The text of joint attention sees
what the first rank sees. `chords` (https://arxiv.org/abs/2507.15260) and ParaStep are played on the solver's grid;
a correction of chords, which needs an evaluation of the next round, is given at once.

Bytes are of keys and values, of one rank to one other, for a picture and step; `waited` is the part of them that
somebody waits for. Rows that the file has are kept, so that a run which was stopped goes on.

    python scripts/measure_stale.py [--model shapes-unet] [--count 4] [--only NAME]
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

import fastdiff
from fastdiff.bench import prompts_for
from fastdiff.parallel.attention import Intercept
from fastdiff.parallel.codec import Wire, packed_size
from scripts.measure_parallel import GUIDANCE, SEED, STEPS, keep, known, quality, setting

OUTPUT = Path(__file__).parents[1] / "benchmarks" / "parallel-stale.json"
Rule = Callable[[int, int, int], bool]  # step, layer, layers: whether this step's values are waited for
Solve = Callable[[Tensor, Tensor, int, int], Tensor]  # latents, the denoiser's output, from and to which step
STARTS = {4: (0, 4, 12, 26), 8: (0, 2, 4, 8, 16, 24, 32, 40)}  # of chords' cores: the authors'


class Residual:
    """The difference to what the receiver has, coded; what was lost is in the next one."""

    def __init__(self) -> None:
        self.known: Tensor | None = None

    def told(self, value: Tensor) -> tuple[Tensor, int]:
        """What the receiver has now, and bytes. value: (batch, heads, tokens, channels)."""
        if self.known is None:
            self.known = value.clone()
            return self.known, value.nbytes
        batch, heads, tokens, width = value.shape
        rest = (value - self.known).transpose(1, 2).reshape(batch, tokens, heads * width)
        coded, size = self.code(rest)
        self.known = self.known + coded.reshape(batch, tokens, heads, width).transpose(1, 2)
        return self.known, size

    def code(self, rest: Tensor) -> tuple[Tensor, int]:
        raise NotImplementedError


class TwoBits(Residual):
    """CompactFusion's: half and twice a scale of token and channel, with signs; scales in half precision."""

    def code(self, rest: Tensor) -> tuple[Tensor, int]:
        size = rest.abs()
        scale = size.mean(-1, keepdim=True) * size.mean(-2, keepdim=True) / size.mean((-1, -2), keepdim=True)
        level = torch.where(size > scale, 2.0, 0.5)
        batch, tokens, width = rest.shape
        return rest.sign() * level * scale.nan_to_num(), batch * (tokens * width // 4 + 2 * (tokens + width))


class LowRank(Residual):
    """Two subspace iterations that begin with what was found last."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank, self.right = rank, torch.empty(0)

    def code(self, rest: Tensor) -> tuple[Tensor, int]:
        batch, tokens, width = rest.shape
        if not self.right.numel():
            generator = torch.Generator().manual_seed(0)
            self.right = torch.randn(batch, width, self.rank, generator=generator)
        for _ in range(2):
            left = torch.linalg.qr(rest @ self.right)[0]
            self.right = rest.transpose(1, 2) @ left
        return left @ self.right.transpose(1, 2), batch * self.rank * (tokens + width) * 2


class Shipped:
    """A codec of the product."""

    def __init__(self, codec: Any) -> None:
        self.wire, self.codec = Wire(codec), codec
        self.other = Wire(codec)

    def told(self, value: Tensor) -> tuple[Tensor, int]:
        size = packed_size(self.codec, tuple(value.shape), value.dtype, self.wire.known is None)
        return self.other.unpack(self.wire.pack(value), tuple(value.shape), value.dtype), size


class Ranks:
    """All ranks of a picture, in attention: who sees what of whom."""

    def __init__(self, parts: int, rule: Rule, codec: Callable[[], Any], joint: int) -> None:
        self.parts, self.rule, self.codec, self.joint = parts, rule, codec, joint
        self.step = self.layer = self.layers = 0
        self.slots: dict[tuple[int, int], tuple[Any, Tensor]] = {}
        self.sent = self.waited = 0
        self.far: list[float] = []  # what is used, from what it should be

    def attend(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, **how: Any) -> Tensor:
        layer, self.layer = self.layer, self.layer + 1
        if not self.joint and layer % 2:  # text
            return F.scaled_dot_product_attention(query, key, value, **how)
        picture, width = self.joint or key.shape[-2], key.shape[-1]
        both, words = torch.cat([key, value], -1).split([picture, key.shape[-2] - picture], -2)
        fresh = self.step == 0 or self.rule(self.step, layer, self.layers)
        pieces, seen = both.chunk(self.parts, -2), []
        for k, piece in enumerate(pieces):
            codec, old = self.slots.get((layer, k), (self.codec(), piece))
            new, size = codec.told(piece)
            self.slots[layer, k] = codec, new
            seen.append(new if fresh else old)
            self.sent, self.waited = self.sent + size, self.waited + size * fresh
            if self.step > 4:
                self.far.append(float((seen[-1] - piece).norm() / piece.norm()))
        out, queries = [], [*query[..., :picture, :].chunk(self.parts, -2)]
        queries[0] = torch.cat([queries[0], query[..., picture:, :]], -2)
        for k, some in enumerate(queries):
            sees = torch.cat([*seen[:k], pieces[k], *seen[k + 1 :], words], -2)
            out.append(F.scaled_dot_product_attention(some, sees[..., :width], sees[..., width:], **how))
        first = pieces[0].shape[-2]
        return torch.cat([out[0][..., :first, :], *out[1:], out[0][..., first:, :]], -2)


class Model:
    """A pipeline's denoiser with guidance, on the grid of its solver, and the latents and text of some captions."""

    def __init__(self, name: str, count: int) -> None:
        self.pipe: Any = fastdiff.load(name)
        self.pipe.set_progress_bar_config(disable=True)
        self.prompts, self.dit = prompts_for(self.pipe, count, SEED), hasattr(self.pipe, "transformer")
        self.net = self.pipe.transformer if self.dit else self.pipe.unet
        self.call: dict[str, Any] = {}
        hook = self.net.register_forward_pre_hook(self._met, with_kwargs=True)
        seeds = [torch.Generator().manual_seed(SEED + k) for k in range(count)]
        told = {"num_inference_steps": 1, "guidance_scale": GUIDANCE, "output_type": "latent"}
        self.pipe([*self.prompts.texts], generator=seeds, **told)
        hook.remove()
        self.pipe.scheduler.set_timesteps(STEPS)
        self.times = self.pipe.scheduler.timesteps
        self.start, self.evaluations = self.latents.chunk(2)[0], 0

    def _met(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        given = dict(zip(("sample", "timestep"), args, strict=False)) | kwargs
        self.latents = given.pop("hidden_states" if self.dit else "sample")
        self.call = {k: v for k, v in given.items() if k not in ("timestep", "return_dict")}

    @torch.no_grad()
    def output(self, x: Tensor, index: int) -> Tensor:
        self.evaluations += 1
        both, time = torch.cat([x, x]), self.times[index]
        args = {"hidden_states": both, "timestep": time.expand(len(both))} if self.dit else {"sample": both}
        given = self.call | args | ({} if self.dit else {"timestep": time})
        without, within = self.net(**given, return_dict=False)[0].chunk(2)
        return without + GUIDANCE * (within - without)

    def solve(self, x: Tensor, e: Tensor, begin: int, end: int) -> Tensor:
        """Euler for the flow, DDIM for the noise: one step of any length."""
        if self.dit:
            sigmas = self.pipe.scheduler.sigmas
            return x + (sigmas[end] - sigmas[begin]) * e
        (a, s), (b, r) = self._levels(begin), self._levels(end)
        return b * (a * x - s * e) + r * (a * e + s * x)

    def _levels(self, index: int) -> tuple[float, float]:
        scheduler = self.pipe.scheduler
        final = index >= STEPS
        kept = scheduler.final_alpha_cumprod if final else scheduler.alphas_cumprod[int(self.times[index])]
        return math.sqrt(kept), math.sqrt(1 - kept)

    @torch.no_grad()
    def decoded(self, x: Tensor) -> Any:
        config = self.pipe.vae.config
        latents = x / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)
        pixels = self.pipe.vae.decode(latents.to(self.pipe.vae.dtype), return_dict=False)[0]
        return self.pipe.image_processor.postprocess(pixels.float(), output_type="np")

    def plain(self, ranks: Ranks | None = None) -> Tensor:
        x = self.start
        for index in range(STEPS):
            with nullcontext() if ranks is None else Intercept(ranks.attend):
                if ranks is not None:
                    ranks.step, ranks.layers, ranks.layer = index, max(ranks.layer, ranks.layers), 0
                e = self.output(x, index)
            x = self.solve(x, e, index, index + 1)
        return x

    def parastep(self, ranks: int, warmup: int, order: int) -> tuple[Tensor, int]:
        """The picture, and rounds: evaluations one after the other."""
        x, index, rounds, old = self.start, 0, 0, list[tuple[float, Tensor]]()
        while index < STEPS:
            count = 1 if index < warmup else min(ranks, STEPS - index)
            guessed, outputs = x, []
            for k in range(count):
                outputs.append(self.output(guessed, index + k))
                if k + 1 < count:
                    guessed = self.solve(guessed, self._line(old, index + k, order), index + k, index + k + 1)
            for k, e in enumerate(outputs):
                x = self.solve(x, e, index + k, index + k + 1)
                old = [*old[-1:], (float(self.times[index + k]), e)]
            index, rounds = index + count, rounds + 1
        return x, rounds

    def _line(self, old: list[tuple[float, Tensor]], index: int, order: int) -> Tensor:
        (time, e), (before, older) = old[-1], old[0]
        return (
            e if order == 1 or len(old) < 2 else e + (float(self.times[index]) - time) / (time - before) * (e - older)
        )

    def chords(self, starts: tuple[int, ...]) -> Iterator[tuple[int, int, Tensor]]:
        """Rounds, core and picture of each core that ends, the last begun first; as its authors correct them."""
        now, places, began = [self.start], list(starts), list[tuple[int, Tensor, Tensor]]()
        for begin, end in zip(starts, [*starts[1:], STEPS], strict=True):
            began.append((begin, now[-1], self.output(now[-1], begin)))
            now.append(self.solve(now[-1], began[-1][2], begin, end))
        now.pop()
        for round_ in range(STEPS + len(starts)):
            active = [c for c in range(len(starts)) if c <= round_ and places[c] < STEPS]
            for c in active:
                e = began[c][2] if places[c] == began[c][0] else self.output(now[c], places[c])
                now[c], places[c] = self.solve(now[c], e, places[c], places[c] + 1), places[c] + 1
            for c in active:
                begin, old, e = began[c]
                if c and places[c - 1] == begin and places[c] > begin:
                    right = now[c - 1]
                    better = self.solve(right, self.output(right, begin), begin, places[c])
                    now[c] = now[c] + better - self.solve(old, e, begin, places[c])
                    at = min(places[c], STEPS - 1)
                    began[c] = places[c], now[c], self.output(now[c], at) if places[c] < STEPS else e
            for c in active:
                if places[c] == STEPS:
                    yield round_ + 1, c, now[c]


def rules() -> dict[str, Rule]:
    return {
        "warm-up 4": lambda i, k, n: i <= 4,
        "warm-up 8": lambda i, k, n: i <= 8,
        "warm-up 4, cool-down 4": lambda i, k, n: i <= 4 or i >= STEPS - 4,
        "warm-up 4, refresh 5": lambda i, k, n: i <= 4 or (i - 4) % 5 == 0,
        "warm-up 4, deep half": lambda i, k, n: i <= 4 or 2 * k >= n,
        "warm-up 4, shallow half": lambda i, k, n: i <= 4 or 2 * k < n,
        "warm-up 1": lambda i, k, n: i <= 1,
    }


def codecs() -> dict[str, Callable[[], Any]]:
    ranked = {f"low rank {rank}": lambda rank=rank: LowRank(rank) for rank in (4, 8)}
    return {"residual": lambda: Shipped("residual"), "2 bits": TwoBits, **ranked, "int8": lambda: Shipped("int8")}


def asked() -> dict[str, tuple[int, Rule, Callable[[], Any]]]:
    """Rows by name: parts, rule and codec."""
    found: dict[str, tuple[int, Rule, Callable[[], Any]]] = {}
    every, raw = rules(), lambda: Shipped("raw")
    for name, codec in codecs().items():
        found[f"2 ranks, {name}, each step waits"] = 2, lambda *_: True, codec
        found[f"2 ranks, {name}, displaced"] = 2, every["warm-up 4"], codec
    for parts in (2, 4):
        for name, rule in every.items():
            found[f"{parts} ranks, displaced, {name}"] = parts, rule, raw
    return found


def measured(model: Model, name: str) -> list[dict[str, Any]]:
    """Rows of a name, with the latents that they end with."""
    if name == "plain":
        return [{"name": name, "latents": model.plain()}]
    if name.startswith("chords"):
        starts = STARTS[int(name.split()[1])]
        return [{"name": f"{name}, core {c}", "rounds": r, "latents": x} for r, c, x in model.chords(starts) if r <= 41]
    if name.startswith("parastep"):
        _, ranks, warmup, order = name.replace(",", "").split()
        x, rounds = model.parastep(int(ranks[2:]), int(warmup[1:]), int(order[1:]))
        return [{"name": name, "rounds": rounds, "latents": x}]
    parts, rule, codec = asked()[name]
    ranks_ = Ranks(parts, rule, codec, joint=64 if model.dit else 0)
    row = {"name": name, "latents": model.plain(ranks_)}
    each = len(model.start) * STEPS * parts
    return [row | {
        "bytes": round(ranks_.sent / each), "waited": round(ranks_.waited / each),
        "far": round(sum(ranks_.far) / len(ranks_.far), 5),
    }]  # fmt: skip


STEPPED = (
    "parastep p=2 w1 o1", "parastep p=2 w1 o2", "parastep p=4 w1 o1", "parastep p=4 w4 o1", "parastep p=8 w1 o1",
    "chords 4", "chords 8",
)  # fmt: skip


def main(
    model: Annotated[list[str] | None, typer.Option(help="Embedded models; both by default.")] = None,
    count: Annotated[int, typer.Option(min=2, help="Held-out captions.")] = 4,
    only: Annotated[str, typer.Option(help="Rows that have this in their name.")] = "",
    file: Annotated[Path, typer.Option("--output", "-o", help="Where the rows are, and go.")] = OUTPUT,
) -> None:
    """Measure what the file does not hold yet."""
    torch.set_num_threads(1)
    for name in model or ("shapes-unet", "shapes-dit"):
        played = Model(name, count)
        whole = played.decoded(played.plain())
        for wanted in [row for row in (*asked(), *STEPPED) if only in row]:
            first = {"model": name, "ranks": 0, "name": f"{wanted}, core 3" if "chords" in wanted else wanted}
            if known(file, first):
                continue
            began, played.evaluations = time.process_time(), 0
            for row in measured(played, wanted):
                found = quality(played.decoded(row.pop("latents")), whole, played.prompts)
                spent = {"cpu_seconds": round(time.process_time() - began, 1), "evaluations": played.evaluations}
                keep(file, first | row | found | spent, setting(played.pipe, count, count) | {"remark": __doc__})
                print(name, row, found["psnr"], spent, flush=True)


if __name__ == "__main__":
    typer.run(main)
