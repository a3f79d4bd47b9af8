"""What depends on the text, or on a given picture, alone is made once, bit for bit the same, and never when something
else has changed."""

from __future__ import annotations

import diffusers
import pytest
import torch
from PIL import Image

import fastdiff
from fastdiff.pipelines.texts import layers_of_text
from tests import tiny
from tests.core.test_outfit import adapted, folder, loras  # noqa: F401

CROSS = ("sd15", "sdxl", "pixart", "wan")


@pytest.mark.parametrize("name", tiny.FAMILIES)
@pytest.mark.parametrize("text", [{"keys": True}, {"cache": True}, {"cache": True, "keys": True}], ids=str)
def test_bit_equal_in_every_call(name, text):
    pipe = tiny.make(name)
    calls = [{}, {"seed": 1}, {"prompt": "another text"}, {}]
    plain = [tiny.run(pipe, name, steps=3, **call) for call in calls]
    with fastdiff.accelerate(pipe, text=text):
        assert all(torch.equal(tiny.run(pipe, name, steps=3, **c), p) for c, p in zip(calls, plain, strict=True))
    assert torch.equal(tiny.run(pipe, name, steps=3), plain[0])


@pytest.mark.parametrize("name", CROSS)
def test_keys_are_computed_once_a_run(name):
    pipe = tiny.make(name)
    fast = fastdiff.accelerate(pipe, text={"keys": True})
    layers = len(list(layers_of_text(tiny.denoiser(pipe))))
    for _ in range(2):
        tiny.run(pipe, name, steps=5)
        branches = 2 if name in tiny.TWO_CALLS else 1
        assert fast.keys.computed == layers * branches > 0
        assert fast.keys.remembered == 4 * layers * branches


def test_joint_attention_has_no_keys_of_text_alone():
    for name in ("sd3", "cogvideox"):
        assert not [one for one in layers_of_text(tiny.denoiser(tiny.make(name))) if type(one) is torch.nn.Linear]


def test_embeddings_are_remembered_across_calls_and_settings():
    pipe = tiny.make("sd15")
    fast = fastdiff.accelerate(pipe, text={"cache": True})
    tiny.run(pipe, "sd15")
    assert (fast.embeddings.hits, fast.embeddings.misses) == (0, 2)
    tiny.run(pipe, "sd15", seed=1)
    assert (fast.embeddings.hits, fast.embeddings.misses) == (2, 2)
    tiny.run(pipe, "sd15", prompt="another")
    assert (fast.embeddings.hits, fast.embeddings.misses) == (3, 3)
    again = fastdiff.accelerate(pipe, text={"cache": True}, cache={"method": "deepcache", "interval": 2})
    tiny.run(pipe, "sd15")
    assert again.embeddings is fast.embeddings and again.embeddings.hits == 5


def encoder_is_nudged(pipe):
    with torch.no_grad():
        pipe.text_encoder.get_parameter(next(n for n, _ in pipe.text_encoder.named_parameters())).mul_(1.5)


def encoder_is_nudged_uncounted(pipe):
    for weight in pipe.text_encoder.parameters():
        weight.data = weight.data * 1.5


def encoder_is_half(pipe):
    pipe.text_encoder.to(torch.float16).to(torch.float32)


@pytest.mark.parametrize("change", [encoder_is_nudged, encoder_is_nudged_uncounted, encoder_is_half])
def test_a_changed_encoder_is_asked_again(change):
    pipe = tiny.make("sd15")
    pipe.text_encoder = type(pipe.text_encoder)(pipe.text_encoder.config).eval()  # not the one that tests share
    fastdiff.accelerate(pipe, text={"cache": True, "keys": True})
    before = tiny.run(pipe, "sd15")
    change(pipe)
    after = tiny.run(pipe, "sd15")
    fastdiff.restore(pipe)
    assert torch.equal(after, tiny.run(pipe, "sd15")) and not torch.equal(before, after)


def test_lora_between_calls_and_within_a_run(loras):  # noqa: F811
    pipe = tiny.make("sd15")
    fastdiff.accelerate(pipe, text={"cache": True, "keys": True})
    pipe.load_lora_weights(str(loras / "one.safetensors"), adapter_name="one")

    def halved(given, step):
        if step == 2:
            given.set_adapters("one", 0.5)

    def draw():
        pipe.set_adapters("one", 1.0)
        return tiny.run(pipe, "sd15", **tiny.at_each_step("sd15", halved))

    fast = draw()
    fastdiff.restore(pipe)
    assert torch.equal(fast, draw())
    assert not torch.equal(fast, tiny.run(pipe, "sd15"))


def test_bytes_are_bounded_and_the_oldest_goes():
    pipe = tiny.make("sd15")
    fast = fastdiff.accelerate(pipe, text={"cache": True})
    tiny.run(pipe, "sd15", steps=1)
    one = fast.embeddings.held // 2
    assert one > 0
    fast.embeddings.most = 3 * one
    for word in ("a", "b", "c"):
        tiny.run(pipe, "sd15", steps=1, prompt=word)
        assert fast.embeddings.held <= 3 * one
    hits = fast.embeddings.hits
    tiny.run(pipe, "sd15", steps=1, prompt="c")
    assert fast.embeddings.hits == hits + 2
    tiny.run(pipe, "sd15", steps=1, prompt="a")
    assert fast.embeddings.hits == hits + 3  # of the negative prompt alone


def test_a_given_picture_is_encoded_once():
    pipe = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(tiny.make("sd15"))
    pipe.vae = type(pipe.vae).from_config(pipe.vae.config).eval()  # not the one that tests share
    encoded: list[object] = []
    pipe.vae.encoder.register_forward_hook(lambda *_: encoded.append(1))
    pictures = Image.linear_gradient("L"), Image.radial_gradient("L")
    calls = [(0, 0), (1, 0), (0, 1), (0, 0)]

    def draw(seed, picture):
        image = pictures[picture].resize((64, 64)).convert("RGB")
        return pipe("a cat", image, num_inference_steps=4, output_type="latent",
                    generator=torch.Generator().manual_seed(seed))[0]  # fmt: skip

    plain = [draw(*call) for call in calls]
    encoded.clear()
    with fastdiff.accelerate(pipe, text={"cache": True}):
        assert all(torch.equal(draw(*call), one) for call, one in zip(calls, plain, strict=True))
        assert len(encoded) == 2
        pipe.vae.enable_tiling()
        draw(*calls[0])
        assert len(encoded) > 2
    assert "encode" not in vars(pipe.vae)


def test_clips_are_encoded_once_and_stay_what_they_were():
    vae = (pipe := tiny.make("wan")).vae
    clip = torch.linspace(-1, 1, 3 * 5 * 16 * 16).reshape(1, 3, 5, 16, 16)
    with torch.no_grad():
        plain = vae.encode(clip).latent_dist.parameters
        with fastdiff.accelerate(pipe, text={"cache": True}) as fast:
            for _ in range(3):
                found = vae.encode(clip, return_dict=False)[0]
                assert torch.equal(found.parameters, plain)
                found.parameters.zero_()
            assert (fast.embeddings.hits, fast.embeddings.held > plain.nbytes) == (2, True)


def test_embeddings_that_a_caller_changes_stay_what_they_were():
    pipe = tiny.make("sd15")
    fastdiff.accelerate(pipe, text={"cache": True})
    plain = tiny.run(pipe, "sd15")
    with torch.no_grad():
        ids = pipe.tokenizer("a red cat", padding="max_length", return_tensors="pt").input_ids
        for _ in range(2):
            pipe.text_encoder(ids)[0].zero_()
    assert torch.equal(tiny.run(pipe, "sd15"), plain)


def test_gradients_reach_the_text():
    pipe = tiny.make("sd15")
    fast = fastdiff.accelerate(pipe, text={"cache": True, "keys": True})
    ids = torch.zeros(1, 77, dtype=torch.long)
    assert pipe.text_encoder(ids)[0].requires_grad and fast.embeddings.held == 0


def test_with_other_levers():
    pipe = tiny.make("sd15")
    for lever in (
        {"quant": "w8a16"},
        {"cache": {"method": "deepcache", "interval": 2}},
        {"cache": {"method": "tgate"}},
    ):
        with fastdiff.accelerate(pipe, **lever):
            expected = tiny.run(pipe, "sd15")
        with fastdiff.accelerate(pipe, text={"cache": True, "keys": True}, **lever):
            assert torch.equal(tiny.run(pipe, "sd15"), expected)


def test_unknown_keys_are_named():
    with pytest.raises(fastdiff.FastdiffError, match="did you mean 'cache'"):
        fastdiff.Config(text={"cahce": True})
