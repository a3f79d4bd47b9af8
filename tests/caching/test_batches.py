"""What has a row for each image is told by its name, and inside the denoiser by comparing calls: never by its size."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

import fastdiff
from fastdiff.batches import Batches
from fastdiff.caching.guidance import GuidanceGate
from fastdiff.pipelines.families import anatomies
from tests import tiny
from tests.zoo import ZOO
from tests.zoo_entry import noise, picture


def decoded(pipe: Any, draw: Any, many: int) -> tuple[Tensor, list[str]]:
    """A run of two groups of `many` steps, in one forward each or one by one, and what the report says."""
    settings = {"method": "faster_diffusion", "interval": abs(many), "max_parallel": max(1, many), "noise": 0}
    with fastdiff.accelerate(pipe, cache=settings) as handle:
        found = draw(pipe, 2 * abs(many))
        return found, list(handle.report.notes)


def assert_close(a: Tensor, b: Tensor) -> None:
    assert float((a.double() - b.double()).abs().max() / b.double().abs().max()) < 1e-4


@pytest.mark.parametrize(
    ("name", "many"),
    [("qwen image", 7), ("qwen image", 16), ("mochi", 4), ("allegro", 2)],
    ids=["as many steps as tokens of text", "as tokens of the picture", "a table of places", "places as indices"],
)
def test_sizes_that_are_the_same_by_chance_are_no_batch(name, many):
    entry = ZOO[name]
    together, notes = decoded(entry.make(), entry.run, many)
    one_by_one, _ = decoded(entry.make(), entry.run, -many)
    assert_close(together, one_by_one)
    assert not any("step by step" in note for note in notes)


def klein_with_kept_keys() -> DiffusionPipeline:
    """Flux 2 Klein, whose first step gives keys and values of a picture that the later ones are called with."""
    kind: Any = diffusers.Flux2KleinKVPipeline
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = diffusers.Flux2Transformer2DModel(
            in_channels=16, num_layers=2, num_single_layers=3, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=32, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
        )  # fmt: skip
        vae = diffusers.AutoencoderKLFlux2(
            block_out_channels=(8, 8, 8, 8), latent_channels=4, norm_num_groups=4, layers_per_block=1
        ).eval()
    pipe = kind(
        transformer=tiny.lively(transformer), vae=vae, text_encoder=None, tokenizer=None,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.skipif(not hasattr(diffusers, "Flux2KleinKVPipeline"), reason="this diffusers does not have it")
def test_what_is_no_tensor_cannot_be_enlarged_and_each_step_is_decoded_by_itself():
    shown = diffusers.image_processor.VaeImageProcessor().pt_to_numpy(picture())
    shown = diffusers.image_processor.VaeImageProcessor().numpy_to_pil(shown)[0]

    def draw(pipe: Any, steps: int) -> Tensor:
        call = {"image": shown, "num_inference_steps": steps, "height": 64, "width": 64, "output_type": "latent"}
        return pipe(prompt_embeds=noise(1, 7, 32, seed=1), generator=torch.Generator().manual_seed(0), **call)[0]

    together, notes = decoded(klein_with_kept_keys(), draw, 3)
    assert any("decoded step by step" in note for note in notes)
    one_by_one, _ = decoded(klein_with_kept_keys(), draw, -3)
    assert_close(together, one_by_one)


def batches(name: str = "sd15") -> Batches:
    return Batches(anatomies(tiny.make(name))[0])


def repeated(own: Any) -> Any:
    return torch.cat([own, own]) if isinstance(own, Tensor) else own * 2


def test_an_argument_has_rows_by_its_name_and_only_if_their_number_is_right():
    found, latents, text = batches("flux"), torch.zeros(2, 16, 4), torch.zeros(2, 2, 8)
    known = {"hidden_states": latents, "encoder_hidden_states": text, "timestep": torch.zeros(2)}
    tables = {"img_ids": torch.zeros(2, 3), "txt_ids": torch.zeros(2, 3), "guidance": None, "return_dict": False}
    kwargs = known | tables | {"joint_attention_kwargs": {"scale": 0.5}}
    assert found.unknown((), kwargs) is None
    _, changed = found.change((), kwargs, repeated)
    assert [len(changed[name]) for name in known] == [4, 4, 4]
    assert all(changed[name] is tables[name] for name in tables), "two places are not two images"
    for more in (
        {"pooled_projections": torch.zeros(3, 8)},
        {"joint_attention_kwargs": {"regional_mask": torch.zeros(2, 8)}},
        {"joint_attention_kwargs": {"kept": object()}},
    ):
        assert found.unknown((), kwargs | more) == next(iter(more))
    assert found.unknown((), kwargs | {"hidden_states": [latents]}) == "hidden_states"
    args, rest = found.change((latents, text), {"timestep": torch.tensor(7.0)}, repeated)
    assert [len(arg) for arg in args] == [4, 4] and rest["timestep"].ndim == 0


def test_lists_with_an_entry_for_each_image_are_changed_too():
    """Qwen-Image tells places of pictures apart by `img_shapes`, one entry an image."""
    entry = ZOO["qwen image"]
    found = Batches(anatomies(entry.make())[0])
    kwargs = {"hidden_states": torch.zeros(2, 16, 4), "img_shapes": [[(1, 4, 4)], [(1, 2, 8)]]}
    assert found.unknown((), kwargs) is None
    assert found.change((), kwargs, repeated)[1]["img_shapes"] == kwargs["img_shapes"] * 2
    assert found.change((), kwargs, lambda own: own[len(own) // 2 :])[1]["img_shapes"] == [[(1, 2, 8)]]
    assert found.unknown((), kwargs | {"img_shapes": [[(1, 4, 4)]]}) == "img_shapes"


def test_a_layer_that_is_computed_for_one_half_is_not_averaged():
    listeners: Any = SimpleNamespace(on_output=[], on_start=[], on_end=[])
    session: Any = SimpleNamespace(clock=listeners, anatomy=anatomies(tiny.make("wan"))[0], regions=[])
    gate = GuidanceGate(lambda run, index: True, 1, session, lambda latents: latents, delta=False)
    averaged = gate._averaged(lambda x: x, number=0)
    value = torch.tensor([[1.0], [3.0]])
    gate._halved = True
    session.skipping = lambda number: False
    assert torch.equal(averaged(value), value)
    session.skipping = lambda number: True
    assert torch.equal(averaged(value), torch.tensor([[2.0]]))
