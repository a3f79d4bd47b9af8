"""Quantized while it is read: the same bits as loading and quantizing, and never more floats than one layer."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fastdiff
from fastdiff.errors import BadConfig
from fastdiff.pipelines import streamed as reading
from fastdiff.pipelines.quantized_parts import align
from fastdiff.quant.install import QuantReport
from fastdiff.quant.layer import QLayer
from fastdiff.quant.schemes.w8a16 import W8A16
from tests import tiny

ROOT = Path(__file__).parents[2]
CASES = [("sd15", "w8a16"), ("sd15", "w8a8"), ("flux", "w4a16"), ("sd3", "w8a8"), ("wan", "fp8"), ("wan", "w8a16")]


def saved(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> str:
    """In several files, as large models are."""
    pipe = tiny.make(name)
    tiny.denoiser(pipe).to(dtype)
    pipe.save_pretrained(folder, max_shard_size="50KB")
    denoiser = folder / ("unet" if name in tiny.UNETS else "transformer")
    assert len(list(denoiser.glob("*.safetensors"))) > 1
    return str(folder)


def small(method: str, **more: Any) -> dict[str, Any]:
    return {"quant": {"method": method, "speed": "smallest", **more}}


@pytest.mark.parametrize(("name", "method"), CASES)
def test_it_is_what_loading_and_quantizing_gives_to_the_last_bit(name, method, tmp_path):
    folder = saved(name, tmp_path / "model")
    pipe, plain = fastdiff.load(folder, quant=small(method)), fastdiff.load(folder)
    align(plain)  # what is mapped from a file lies anywhere, where sums may round otherwise
    fastdiff.quantize(plain, small(method))
    for found, wanted in zip(tiny.denoiser(pipe).named_buffers(), tiny.denoiser(plain).named_buffers(), strict=True):
        same = found[1] if found[1].layout == torch.strided else found[1].to_dense()
        assert found[0] == wanted[0] and same.dtype == wanted[1].dtype
    assert sum(isinstance(part, QLayer) for part in tiny.denoiser(pipe).modules()) > 10
    for one in (pipe, plain):
        one.set_progress_bar_config(disable=True)
    assert torch.equal(pipe(**tiny.arguments(name, 3))[0], plain(**tiny.arguments(name, 3))[0])


def test_classes_keep_in_float32_what_they_keep(tmp_path):
    folder = saved("wan", tmp_path / "model", torch.bfloat16)
    pipe = fastdiff.load(folder, dtype=torch.bfloat16, quant=small("w8a16"))
    plain = fastdiff.load(folder, dtype=torch.bfloat16)
    kept = {name: p.dtype for name, p in plain.transformer.named_parameters()}
    assert {torch.float32, torch.bfloat16} <= set(kept.values())
    own = {name: p.dtype for name, p in pipe.transformer.named_parameters()}
    assert own and all(kept[name] is dtype for name, dtype in own.items() if name in kept)


def test_no_more_floats_are_held_than_those_of_a_layer(tmp_path, monkeypatch):
    folder = saved("sd15", tmp_path / "model")
    largest = max(m.weight.numel() for m in fastdiff.load(folder).unet.modules() if hasattr(m, "weight")) * 4
    held: list[int] = []
    before = reading.quantize_model

    def watched(root: Any, *args: Any, weights: Any, **more: Any) -> None:
        def counting(found: Any) -> Any:
            real = [p for p in root.parameters() if not p.is_meta]
            held.append(sum(p.numel() * p.element_size() for p in real))
            return weights(found)

        before(root, *args, weights=counting, **more)

    monkeypatch.setattr(reading, "quantize_model", watched)
    fastdiff.load(folder, quant=small("w8a16"))
    assert len(held) > 100 and max(held) <= largest


@pytest.mark.parametrize(
    "more", [{"components": ["denoiser", "text_encoder"]}, {"rounding": "mse"}, {"low_rank": 4}, {"keep": ["*attn2*"]}]
)
def test_other_settings_are_obeyed(more, tmp_path):
    folder = saved("sd15", tmp_path / "model")
    pipe, plain = fastdiff.load(folder, quant=small("w4a16", **more)), fastdiff.load(folder)
    fastdiff.quantize(plain, small("w4a16", **more))
    for part in ("unet", "text_encoder"):
        layers = [
            {name for name, m in one.components[part].named_modules() if isinstance(m, QLayer)} for one in (pipe, plain)
        ]
        assert layers[0] == layers[1]
        for name in layers[0]:
            assert torch.equal(*(one.components[part].get_submodule(name).q for one in (pipe, plain)))


def test_of_two_denoisers_both_are_streamed_or_none(monkeypatch, tmp_path):
    """One that stayed float for the names in its files would be taken for quantized."""
    one, other = SimpleNamespace(component="transformer"), SimpleNamespace(component="transformer_2")
    made = {"transformer": torch.nn.Identity(), "transformer_2": None}
    monkeypatch.setattr(reading, "_made", lambda anatomy, *_: made[anatomy.component])
    method = W8A16(method="w8a16")
    told = (tmp_path, method, torch.float32, "cpu", QuantReport("w8a16"))
    assert reading.streamed([one, other], *told) == {}
    assert reading.streamed([one], *told) == {"transformer": made["transformer"]}


def test_what_was_read_so_can_be_saved_accelerated_and_loaded(tmp_path):
    folder = saved("sd15", tmp_path / "model")
    pipe = fastdiff.load(folder, quant=small("w8a8"))
    pipe.set_progress_bar_config(disable=True)
    wanted = tiny.run(pipe, "sd15")
    fastdiff.save(pipe, tmp_path / "small")
    again = fastdiff.load(tmp_path / "small")
    again.set_progress_bar_config(disable=True)
    assert torch.allclose(tiny.run(again, "sd15"), wanted, rtol=1e-3, atol=1e-3)
    with fastdiff.accelerate(pipe, cache="deepcache") as handle:
        tiny.run(pipe, "sd15")
        assert handle.report.cached > 0 and any("quantized for good" in note for note in handle.report.notes)
    with pytest.raises(BadConfig, match="is quantized already; leave out quant"):
        fastdiff.load(tmp_path / "small", quant="w8a8")


def test_files_with_other_names_are_read_by_diffusers_and_quantized_then(tmp_path, monkeypatch):
    folder = saved("sd15", tmp_path / "model")
    monkeypatch.setattr(reading, "_made", lambda *_: None)
    pipe = fastdiff.load(folder, quant=small("w8a16"))
    assert sum(isinstance(part, QLayer) for part in pipe.unet.modules()) > 100


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is looked at as Linux tells it")
def test_a_large_model_takes_what_its_integers_take(tmp_path):
    """A UNet of 440 MB of float32: with its integers of 110 MB some MB of float layers."""
    script = [sys.executable, "scripts/measure_loading.py", "--width", "160", "--schemes", "w8a16"]
    file = tmp_path / "found.json"
    subprocess.run([*script, "-o", str(file)], cwd=ROOT, check=True, capture_output=True, timeout=900)
    rows = {row["way"]: row for row in json.loads(file.read_text())["rows"]}
    assert rows["quantized while read"]["own_peak_mb"] < 200
    assert rows["load, then quantize"]["peak_mb"] > 440
