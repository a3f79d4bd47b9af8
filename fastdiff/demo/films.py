"""Two videos beside each other, on the page."""

from __future__ import annotations

from typing import Any

import gradio as gr

from fastdiff.media import can_mp4


def places() -> dict[str, Any]:
    """Where two videos go, hidden at first; by the names of the page's parts."""
    with gr.Row(visible=False, elem_id="films") as row:
        left, right = (_place(name) for name in ("without", "accelerated"))
    return {"films": row, "left": left, "right": right}


def _place(name: str) -> Any:
    """For a video; for an animated WebP, which browsers show as a picture, where no MP4 can be written."""
    if not can_mp4():
        return gr.Image(label=name.capitalize(), type="filepath", interactive=False, elem_id=name)
    return gr.Video(label=name.capitalize(), interactive=False, autoplay=True, loop=True, elem_id=name)


def shown(files: tuple[str, ...]) -> dict[str, Any]:
    """Updates that show the files of both."""
    return {"films": gr.update(visible=True), "left": files[0], "right": files[1]}
