"""Modulations and embedders of time: kept in float, or their weights alone quantized, whatever the scheme."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastdiff
from fastdiff.quant.base import KEPT, VECTORS, QuantMethod
from fastdiff.quant.schemes.w8a8 import W8A8
from tests import tiny
from tests.tiny import FAMILIES


def kinds(pipe, method: dict) -> dict[str, tuple[str, str]]:
    with fastdiff.accelerate(pipe, quant={"speed": "smallest", **method}) as handle:
        return {layer.name: (layer.format, layer.activations) for layer in handle.quantized.report.layers}


@pytest.mark.parametrize("vectors", ["int8", "int4"])
def test_weights_of_what_sees_one_vector_are_quantized_alone(vectors):
    pipe = tiny.make("flux")
    without, found = kinds(pipe, {"method": "w8a8"}), kinds(pipe, {"method": "w8a8", "vectors": vectors})
    more = {name for name in found if name not in without}
    assert {found[name] for name in more} == {(vectors, "none")}
    assert {found[name] for name in without} == {("int8", "int8")}
    assert any(name.endswith("norm1.linear") for name in more) and any("time_text_embed" in name for name in more)
    assert not any(name in found for name in ("x_embedder", "context_embedder", "proj_out"))
    assert "norm_out.linear" not in kinds(pipe, {"method": "w8a8", "vectors": vectors, "skip": ["norm_out*"]})


def test_a_picture_with_them_is_near_to_one_without():
    pipe = tiny.make("flux")
    plain = tiny.run(pipe, "flux", steps=2)
    off = {}
    for vectors in ("float", "int8", "int4"):
        with fastdiff.accelerate(pipe, quant={"method": "w8a16", "vectors": vectors, "speed": "smallest"}):
            off[vectors] = float((tiny.run(pipe, "flux", steps=2) - plain).norm() / plain.norm())
    assert 0 < off["float"] < 0.05 and off["int8"] < 0.05 and off["int8"] < off["int4"] < 0.3


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_what_is_called_a_vector_is_one(name):
    """No layer of these names is given more than one row an image, in any family."""
    pipe, seen = tiny.make(name), []
    for path, layer in tiny.denoiser(pipe).named_modules():
        if isinstance(layer, nn.Linear) and W8A8(vectors="int8")._alone(path):
            layer.register_forward_pre_hook(lambda _, args, path=path: seen.append((path, args[0].shape)))
    tiny.run(pipe, name, steps=1)
    assert seen and all(shape[:-1].numel() <= 2 for _, shape in seen), seen


def test_by_default_they_are_kept():
    assert QuantMethod.model_fields["vectors"].default == "float"
    assert not any(W8A8().takes(name) for name in ("a.norm1.linear", "time_text_embed.x", "b.adaln_single.linear"))
    assert set(VECTORS) - {"*norm*.linear"} <= set(KEPT)
