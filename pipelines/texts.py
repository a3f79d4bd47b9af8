"""What depends on the text, or on a given picture, alone, made once: embeddings and encodings across calls, keys and
values of the text within a run."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastdiff.anatomy import Anatomy
from fastdiff.clock import StepClock
from fastdiff.config import Config
from fastdiff.patch import PatchSet

Forward = Callable[..., Any]
_PROJECTIONS = ("caption_projection", "caption_norm", "text_embedder")  # between a text and its keys
_SPEC = (bool, int, float, str, type(None))
_BRANCHES = 4  # inputs that one layer is given in a step, at most; after twice as many, none again, it is left alone


def _state(module: nn.Module, sample: bool) -> Any:
    """What a module's answer depends on beside its input. Weights by identity and version, LoRA by what is active;
    `sample` also looks at some values, which changes that nobody counts do not escape."""
    weights = [*module.parameters(), *module.buffers()]
    worn = [(str(part.scaling), str(part.active_adapters), str(part.merged_adapters))
            for part in module.modules() if hasattr(part, "merged_adapters")]  # fmt: skip
    known = [(id(weight), -1 if weight.is_inference() else weight._version, weight.dtype) for weight in weights]
    seen: dict[torch.device, list[Tensor]] = {}
    for weight in weights if sample else ():
        if not weight.is_meta:
            some = weight.flatten()[:: max(1, weight.numel() // 8)]
            seen.setdefault(weight.device, []).append(some if some.dtype == torch.float64 else some.float())
    return known, worn, [torch.cat(some).tolist() for some in seen.values()]  # one look at a device


class Embeddings:
    """Answers of text encoders, and of a VAE that encodes pictures, of one pipeline: those used least recently are let
    go beyond `most` bytes."""

    def __init__(self, most: int) -> None:
        self.most, self.held, self.hits, self.misses = most, 0, 0, 0
        self._answers: OrderedDict[str, tuple[Any, int]] = OrderedDict()

    def install(self, name: str, encoder: nn.Module, patches: PatchSet) -> None:
        patches.wrap_forward(encoder, partial(partial, self._encode, name, encoder))

    def install_vae(self, name: str, vae: Any, patches: PatchSet) -> None:
        """Around the method, since its encoder alone may keep what earlier frames left (Wan)."""
        patches.set(vae, "encode", partial(self._encode, name, vae, vae.encode))

    def _encode(self, name: str, encoder: nn.Module, forward: Forward, *args: Any, **kwargs: Any) -> Any:
        key = None if torch.is_grad_enabled() or encoder.training else self._key(name, encoder, (args, kwargs))
        if key is not None and key in self._answers:
            self.hits += 1
            self._answers.move_to_end(key)
            return _copied(self._answers[key][0])
        self.misses += 1
        answer = forward(*args, **kwargs)
        if key is not None:
            self._keep(key, answer)
        return answer

    def _key(self, name: str, encoder: nn.Module, given: Any) -> str | None:
        leaves, spec = pytree.tree_flatten(given)
        if torch.is_inference_mode_enabled() or not all(isinstance(leaf, (Tensor, *_SPEC)) for leaf in leaves):
            return None
        told = [(x.shape, x.dtype, x.device, hashlib.sha256(x.cpu().flatten().view(torch.uint8).numpy().data).digest())
                if isinstance(x, Tensor) else x for x in leaves]  # fmt: skip
        ways = {key: value for key, value in vars(encoder).items() if isinstance(value, _SPEC)}  # tiles, for one
        return hashlib.sha256(repr((name, spec, told, ways, _state(encoder, True))).encode()).hexdigest()

    def _keep(self, key: str, answer: Any) -> None:
        leaves = pytree.tree_leaves(answer)
        if not all(isinstance(leaf, (Tensor, DiagonalGaussianDistribution, *_SPEC)) for leaf in leaves):
            return
        held = [part for leaf in leaves for part in (leaf, *getattr(leaf, "__dict__", {}).values())]
        size = sum(part.nbytes for part in held if isinstance(part, Tensor))
        if size > self.most:
            return
        self._answers[key] = _copied(answer), size
        self.held += size
        while self.held > self.most:
            self.held -= self._answers.popitem(last=False)[1][1]


def _copied(answer: Any) -> Any:
    return pytree.tree_map(_own, answer)


def _own(leaf: Any) -> Any:
    if isinstance(leaf, DiagonalGaussianDistribution):
        return DiagonalGaussianDistribution(leaf.parameters.clone(), leaf.deterministic)
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def layers_of_text(denoiser: nn.Module) -> Iterator[nn.Module]:
    """Layers that are given the text at each step, and nothing else: they give the same again."""
    for path, module in denoiser.named_modules():
        name = path.rpartition(".")[2]
        if name in _PROJECTIONS and not isinstance(module, nn.ModuleList):
            yield module
        elif isinstance(getattr(module, "to_k", None), nn.Module) and (
            name == "attn2" or getattr(module, "is_cross_attention", False)
        ):
            yield from (module.to_k, module.to_v)


class Keys:
    """Remembers what layers gave for the very same tensor, until the next run begins."""

    def __init__(self) -> None:
        self.computed = self.remembered = 0
        self._stores: list[list[Any]] = []

    def install(self, denoiser: nn.Module, patches: PatchSet) -> None:
        for layer in layers_of_text(denoiser):
            self._stores.append([])
            patches.wrap_forward(layer, partial(partial, self._once, layer, self._stores[-1]))

    def forget(self) -> None:
        self.computed = self.remembered = 0
        for store in self._stores:
            store[:] = []

    def _once(self, layer: nn.Module, store: list[Any], forward: Forward, *args: Any, **kwargs: Any) -> Any:
        text: Any = args[0] if len(args) == 1 and not kwargs else None
        fixed = isinstance(text, Tensor) and not torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        if not fixed or len(store) > 2 * _BRANCHES:
            return forward(*args, **kwargs)
        key = _place(text), _state(layer, False)
        for known, _, answer, version in store:
            if known == key and answer._version == version:
                self.remembered += 1
                return answer
        answer = forward(text)
        self.computed += 1
        store.append((key, text, answer, answer._version))  # the text is held, so that its place stays its own
        if len(store) > 2 * _BRANCHES:
            store[:] = [None] * len(store)
        return answer


def _place(text: Tensor) -> Any:
    """Which tensor this is: views of one are the same."""
    return (
        text.untyped_storage().data_ptr(),
        text.storage_offset(),
        text.shape,
        text.stride(),
        text._version,
        text.dtype,
    )


def install(
    pipe: Any, config: Config, found: Sequence[Anatomy], made: tuple[Embeddings, Keys], clock: StepClock,
    patches: PatchSet,
) -> None:  # fmt: skip
    """What the config wants made once; layers that others split, compile or replace are left to them."""
    embeddings, keys = made
    for name, part in pipe.components.items() if config.text.cache else ():
        if name.startswith("text_encoder") and part is not None:
            embeddings.install(name, part, patches)
        elif isinstance(part, nn.Module) and hasattr(part, "encode"):
            embeddings.install_vae(name, part, patches)
    if config.text.keys and config.parallel is None and config.quant is None and not config.compile.enabled:
        for anatomy in found:
            keys.install(anatomy.denoiser, patches)
        clock.on_start.append(lambda _: keys.forget())
