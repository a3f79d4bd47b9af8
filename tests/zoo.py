"""Every tiny pipeline there is: those of tests/tiny.py, on which all methods are tested, and many classes more."""

from __future__ import annotations

from typing import Any

from tests import tiny, zoo_clips, zoo_images, zoo_unets
from tests.zoo_entry import Entry


def _from_tiny(name: str, deep: str) -> Entry:
    """`tiny`'s Flux has as many tokens of text as of picture; here they differ, so that streams can be told apart."""
    drawn_here = ("num_inference_steps", "generator")

    def told() -> dict[str, Any]:
        return tiny.arguments(name) | ({"max_sequence_length": 12} if name == "flux" else {})

    return Entry(
        lambda: tiny.make(name),
        lambda: {key: value for key, value in told().items() if key not in drawn_here},
        deep,
        "deepcache" if name in tiny.UNETS else "first_block",
        calls=2 if name in tiny.TWO_CALLS else 1,
    )


_LEAVES = {
    "sd15": "unet.mid_block.resnets.0.conv1",
    "sdxl": "unet.mid_block.resnets.0.conv1",
    "sd3": "transformer.transformer_blocks.3.ff.net.2",
    "flux": "transformer.single_transformer_blocks.2.proj_out",
    "pixart": "transformer.transformer_blocks.3.ff.net.2",
    "wan": "transformer.blocks.3.ffn.net.2",
    "cogvideox": "transformer.transformer_blocks.3.ff.net.2",
}
ZOO: dict[str, Entry] = {
    **{name: _from_tiny(name, leaf) for name, leaf in _LEAVES.items()},
    **zoo_unets.ZOO,
    **zoo_images.ZOO,
    **zoo_clips.ZOO,
}
STACKED = tuple(name for name, entry in ZOO.items() if entry.method == "first_block")
