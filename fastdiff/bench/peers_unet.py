"""Rivals on UNets: DeepCache, T-GATE, ToMe, and what of diffusers' own caches works there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .peer import DiffusersCache, FasterCache, Fitted, Peer, Pyramid, TaylorSeer
from .twin import Twin

_UNETS = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
_RESET = "state reset before each call"
_CONTEXT = f"cache context set by the adapter, {_RESET}"


@dataclass(frozen=True)
class DeepCache(Peer):
    """Recompute the outermost blocks only, and the rest every N steps."""

    def fit(self, twin: Twin) -> Fitted:
        from DeepCache import DeepCacheSDHelper

        helper = DeepCacheSDHelper(pipe=twin.pipe)
        helper.set_params(**self.settings)
        helper.enable()

        def reset() -> None:  # the start of the last run and its features outlive a call
            helper.disable()
            helper.enable()

        return Fitted(twin.pipe, reset)


@dataclass(frozen=True)
class TGate(Peer):
    """Freeze cross-attention and drop the guided half of the batch after the gate step; may run over DeepCache."""

    deepcache: dict[str, Any] | None = None

    def record(self) -> dict[str, Any]:
        return super().record() | ({"deepcache": self.deepcache} if self.deepcache else {})

    def check(self, pipe: Any) -> None:
        super().check(pipe)
        if self.deepcache:
            DeepCache(self.name, "DeepCache", {}, self.pipelines).check(pipe)

    def fit(self, twin: Twin) -> Fitted:
        import tgate

        if self.deepcache:
            tgate.TgateSDDeepCacheLoader(twin.pipe, **self.deepcache)
        else:
            tgate.TgateSDLoader(twin.pipe)
        return Fitted(lambda *args, **kwargs: twin.pipe.tgate(*args, **self.settings, **kwargs))


@dataclass(frozen=True)
class ToMe(Peer):
    """Token merging: attention over fewer tokens, in every step."""

    def fit(self, twin: Twin) -> Fitted:
        import tomesd
        import torch

        tomesd.apply_patch(twin.pipe, **self.settings)

        def reset() -> None:  # which tokens are merged is drawn from the global generator of the moment
            generator = torch.Generator(twin.pipe.device).manual_seed(0)
            twin.denoiser._tome_info["args"]["generator"] = generator

        return Fitted(twin.pipe, reset)


def unet_peers(steps: int) -> list[Peer]:
    return [*_deepcache(), *_tgate(steps), *_tome(), *_diffusers()]


def _deepcache() -> list[Peer]:
    points = [(2, 0), (3, 0), (5, 0), (3, 1)]
    return [
        DeepCache(
            f"DeepCache N={interval}" + (f" branch {branch}" if branch else ""), "DeepCache",
            {"cache_interval": interval, "cache_branch_id": branch}, _UNETS, notes=(_RESET,),
        )
        for interval, branch in points
    ]  # fmt: skip


def _tgate(steps: int) -> list[Peer]:
    """Its README gates SD and SDXL at 10 of 25 steps, with sp_interval 5 and warm_up 2; over DeepCache with 1 and 0."""
    found: list[Peer] = []
    for share in (0.2, 0.4):
        gate = max(2, round(share * steps))
        alone = {"gate_step": gate, "sp_interval": 5, "fi_interval": 1, "warm_up": 2}
        over = {"gate_step": gate, "sp_interval": 1, "fi_interval": 1, "warm_up": 0}
        note = f"half the batch after step {gate}"
        only = ("StableDiffusionPipeline",)
        found.append(TGate(f"T-GATE gate {gate}", "tgate", alone, only, notes=(note,)))
        cache = {"cache_interval": 3, "cache_branch_id": 0}
        found.append(TGate(f"T-GATE gate {gate} + DeepCache N=3", "tgate", over, only, cache, notes=(note,)))
    return found


def _tome() -> list[Peer]:
    note = "merges at half resolution too (its default touches full resolution only); random merges seeded in each call"
    return [ToMe("tomesd r=0.5", "tomesd", {"ratio": 0.5, "max_downsample": 2}, _UNETS, notes=(note,))]


def _diffusers() -> list[Peer]:
    found: list[DiffusersCache] = [
        Pyramid(
            f"PAB {spatial}/{cross}", "diffusers",
            {"spatial_attention_block_skip_range": spatial, "cross_attention_block_skip_range": cross}, _UNETS,
            notes=(f"timestep taken from the denoiser's arguments, {_RESET}",),
        )
        for spatial, cross in ((2, 3), (4, 6))
    ]  # fmt: skip
    attention = {"cache_identifiers": [r".*\.attn[12]"]}
    # the lite mode of transformers, by hand: everything heavy returns zeros, the last layer is forecast. Whole blocks
    # and Transformer2DModels cannot be left out, they return tuples that TaylorSeer flattens
    lite = {
        "skip_predict_identifiers": [
            r"(down|up)_blocks\.\d+\.(resnets|downsamplers|upsamplers)\.\d+",
            r"mid_block\.resnets\.\d+",
            r".*\.transformer_blocks\.\d+",
        ],
        "cache_identifiers": ["conv_out"],
    }
    by_hand = f"identifiers set by hand (the defaults match nothing in a UNet), {_CONTEXT}, factors in float32"
    for title, identifiers, intervals in (("attention", attention, (3,)), ("lite", lite, (2, 3, 5))):
        found += [
            TaylorSeer(
                f"TaylorSeer {title} N={n}", "diffusers", {"cache_interval": n, **identifiers}, _UNETS, notes=(by_hand,)
            )
            for n in intervals
        ]
    note = f"skips half the batch in part of the steps, no attention (its patterns match none in a UNet); {_CONTEXT}"
    found.append(FasterCache("FasterCache", "diffusers", {}, _UNETS, notes=(note,)))
    return list(found)
