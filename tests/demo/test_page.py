"""What the page does, called without a browser: pictures, progress, words that reproduce them, bad input, cancel."""

# ruff: noqa: E402 - what follows needs gradio

from __future__ import annotations

import contextlib
import shlex
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

gr = pytest.importorskip("gradio", reason="the demo needs gradio: pip install 'fastdiff[demo]'")

import fastdiff.demo.easel as easels
import fastdiff.demo.page as pages
from fastdiff.cli import run
from fastdiff.config import presets
from fastdiff.demo.easel import Cancelled, Easel, Pair, Progress
from fastdiff.demo.fields import Setting
from fastdiff.demo.order import Ground, Order, sampling
from fastdiff.demo.page import Page
from fastdiff.errors import FastdiffError
from fastdiff.images import read
from fastdiff.registry import names

STEPS = 6


def order(steps: int = STEPS, choice: dict | None = None, **values) -> Order:
    asked = {"prompt": "a red circle", "seed": 3, "steps": steps} | values
    return Order("shapes-unet", choice or {"preset": "balanced"}, sampling(asked))


def pair(easel: Easel, asked: Order) -> Pair:
    *_, last = easel.draw(asked, threading.Event())
    assert isinstance(last, Pair)
    return last


@pytest.fixture(scope="module")
def easel() -> Easel:
    return Easel()


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"))


def test_the_page_has_every_registered_method(visitor):
    for kind, known in names().items():
        assert [value for _, value in visitor.page.inputs[kind].choices] == ["off", *known]
    assert [value for _, value in visitor.page.inputs["preset"].choices] == list(presets())
    assert visitor.given["model"] == "shapes-unet" and visitor.given["cache"] == "ab_cache"


def test_drawing_shows_progress_previews_and_a_pair(visitor, monkeypatch):
    files = []

    def kept(image, path, made, **options):
        files.append((image.copy(), made))
        return pages_save(image, path, made, **options)

    pages_save = pages.save
    monkeypatch.setattr(pages, "save", kept)
    monkeypatch.setattr("fastdiff.demo.easel.PAUSE", 0.01)
    shown = visitor.run(prompt="a <b>red</b> circle", steps=STEPS, seed=3)
    assert any("<progress value=" in update.get("status", "") for update in shown)
    previews = [update["preview"]["value"] for update in shown[:-1] if "preview" in update]
    assert previews and all(picture.size == (64, 64) for picture in previews)
    last = shown[-1]
    assert last["slider"]["visible"] and len(last["slider"]["value"]) == 2
    assert "times as" in last["status"] and "Left: without" in last["status"]
    assert f'aria-label="{STEPS} steps: ' in last["numbers"] and "PSNR" in last["numbers"] and "dB" in last["numbers"]
    (plain, plain_made), (fast, fast_made) = files
    assert plain_made.config["cache"] is None and fast_made.config["cache"]["method"] == "ab_cache"
    assert plain_made.seed == fast_made.seed == 3 and fast_made.steps == STEPS
    assert not np.array_equal(pixels(plain), pixels(fast))


@pytest.mark.parametrize(
    "choice",
    [
        {"preset": "fast"},
        {"preset": "balanced", "cache": {"method": "ab_cache", "interval": 4, "predictor": "taylor"}},
        {"preset": "fast", "cache": None},
    ],
)
def test_the_program_and_the_command_draw_the_same_picture(easel, choice, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = order(choice=choice, prompt="-a \"red\" circle\nand $HOME `ls` 'é'")
    made = pair(easel, asked).fast.drawn
    program = asked.python(made.made)
    exec(compile(program, "copied", "exec"), {})
    assert np.array_equal(pixels(Image.open("out.png")), pixels(made.image))
    words = shlex.split(asked.command(made.made))
    assert words[0] == "fastdiff" and run([*words[1:-2], "-o", "again.png", *words[-2:]]) == 0
    assert np.array_equal(pixels(Image.open("again.png")), pixels(made.image))
    assert read(tmp_path / "again.png").config == made.made.config


def test_the_plain_picture_is_that_of_plain_diffusers(easel, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = order()
    first = pair(easel, asked)
    plain = Order(asked.model, {"preset": "lossless"}, asked.sampling)
    exec(compile(plain.python(first.plain.drawn.made).replace("fast = fastdiff.accelerate(pipe, 'lossless')", "")
                 .replace("print(fast.report)", ""), "plain", "exec"), {})  # fmt: skip
    assert np.array_equal(pixels(Image.open("out.png")), pixels(first.plain.drawn.image))
    again = pair(easel, Order(asked.model, {"preset": "balanced"}, asked.sampling))
    assert (again.again and again.plain is first.plain) or np.array_equal(
        pixels(again.plain.drawn.image), pixels(first.plain.drawn.image)
    )


def ended() -> None:
    """Waits for the denoising threads, each of which may be inside a call of the denoiser."""
    for thread in threading.enumerate():
        if thread.name == "denoising":
            thread.join(timeout=600)
            assert not thread.is_alive()


@pytest.mark.parametrize("how", ["event", "close"])
def test_cancelling_stops_the_denoising_and_the_next_run_is_clean(easel, how):
    """The second half of the calls never happens, no thread stays, and the same order gives the same picture."""
    before = pair(easel, order())
    calls = []
    unet = easel._studio.pipe.unet
    hook = unet.register_forward_pre_hook(lambda *_: calls.append(1))
    stop = threading.Event()
    running = easel.draw(order(steps=1000, seed=4), stop)
    with contextlib.suppress(Cancelled):
        for said in running:
            if isinstance(said, Progress) and said.done >= 3:
                stop.set() if how == "event" else running.close()
    ended()
    hook.remove()
    assert 3 <= len(calls) < 300, "it went on"
    seen = len(calls)
    time.sleep(0.3)
    assert len(calls) == seen
    assert easel._studio.fast.clock.run is None
    after = pair(easel, order())
    assert np.array_equal(pixels(after.fast.drawn.image), pixels(before.fast.drawn.image))
    assert np.array_equal(pixels(after.plain.drawn.image), pixels(before.plain.drawn.image))


def test_who_waits_for_another_picture_is_told_and_may_leave(easel):
    with easel._lock:
        waiting = easel.draw(order(), threading.Event())
        assert next(waiting).doing == "Waiting for another picture"
        waiting.close()
        ended()
    assert pair(easel, order()).fast.report.steps == STEPS


def test_the_page_says_that_it_was_cancelled(visitor, capsys):
    def cancel(order, stop):
        stop.set()
        yield from Easel.draw(visitor.page.easel, order, stop)

    visitor.page.easel.draw, drawn = cancel, visitor.page.easel.draw
    try:
        shown = visitor.run(steps=2)
    finally:
        visitor.page.easel.draw = drawn
    assert "Cancelled" in shown[-1]["status"] and "Traceback" not in capsys.readouterr().err


def test_cancel_stops_the_visitors_own_run_only(visitor):
    mine, other = threading.Event(), threading.Event()
    visitor.page.stops.update(me=mine, other=other)
    visitor.page.cancel(SimpleNamespace(session_hash="me"))
    assert mine.is_set() and not other.is_set()
    visitor.page.cancel(SimpleNamespace(session_hash="nobody"))
    visitor.page.stops.clear()


def test_who_draws_already_is_told_so_and_goes_on_drawing(visitor):
    earlier = visitor.page.stops["visitor"] = threading.Event()
    with pytest.raises(gr.Error, match="cancel it first"):
        visitor.run(steps=2)
    assert visitor.page.stops.pop("visitor") is earlier and not earlier.is_set()


def test_one_too_many_is_told_so_and_waits_in_no_queue(visitor):
    """Cancel reaches all who wait, as none of them waits in Gradio's queue."""
    visitor.page.stops.update({f"visitor {n}": threading.Event() for n in range(pages.VISITORS)})
    try:
        with pytest.raises(gr.Error, match="Too many people"):
            visitor.run(steps=2)
        assert len(visitor.page.stops) == pages.VISITORS
    finally:
        visitor.page.stops.clear()


@pytest.mark.parametrize("late", ["preset", "cache", "quant", "model"])
def test_run_is_refused_while_the_fields_are_those_of_other_settings(late):
    """A preset is chosen at once, its methods come with `shown`, and their fields after that."""
    drawn_for = {"model": "shapes-unet", "shown": "fast", "preset": "fast", "cache": "ab_cache", "quant": "off"}
    pages.followed(drawn_for | {"prompt": "whatever"}, drawn_for)
    with pytest.raises(gr.Error, match="press Run again"):
        pages.followed(drawn_for | {late: "other"}, drawn_for)


BAD = [
    ({"prompt": ""}, "prompt is empty"),
    ({"prompt": " \n\t "}, "prompt is empty"),
    ({"prompt": None}, "prompt is empty"),
    ({"prompt": "x" * 100_000}, "at most 20000"),
    ({"prompt": "\ud800"}, "half of a character"),
    ({"negative_prompt": "x" * 100_000}, "at most 20000"),
    ({"steps": 0}, "steps"),
    ({"steps": "0"}, "steps"),
    ({"steps": "1e3"}, "steps"),
    ({"steps": "9" * 5000}, "steps"),
    ({"width": "64px"}, "width"),
    ({"guidance_scale": "inf"}, "guidance_scale"),
    ({"steps": -3}, "steps"),
    ({"steps": 2.5}, "steps"),
    ({"steps": 1e300}, "steps"),
    ({"steps": float("inf")}, "steps"),
    ({"steps": float("nan")}, "steps"),
    ({"steps": "many"}, "steps"),
    ({"steps": [1]}, "steps"),
    ({"steps": True}, "steps"),
    ({"guidance_scale": -1}, "guidance_scale"),
    ({"guidance_scale": float("nan")}, "guidance_scale"),
    ({"seed": -1}, "seed"),
    ({"seed": 1.5}, "seed"),
    ({"seed": 2.0**60}, "browser holds exactly"),
    ({"width": -8}, "width"),
    ({"width": 65}, "multiples of 8"),
    ({"height": 1_000_000}, "height"),
    ({"model": "no-such-model"}, "unknown model"),
    ({"model": "../../no/such/place"}, "does not exist"),
    ({"model": "<img src=x onerror=alert(1)>"}, "&lt;img"),
    ({"model": ""}, "model"),
    ({"model": None}, "model"),
    ({"model": "\ud800"}, "model"),
    ({"preset": "no-such-preset"}, "unknown preset"),
    ({"preset": None}, "preset"),
    ({"cache": "no-such-method"}, "unknown cache method"),
    ({"cache": "dkv_cache"}, "is for language models"),
    ({"quant": "no-such-method"}, "unknown quant method"),
    ({"parallel": "patch"}, "process"),
]


@pytest.mark.parametrize(
    ("changed", "message"), BAD, ids=lambda value: str(value)[:40].encode("ascii", "replace").decode()
)
def test_bad_input_is_a_message(visitor, changed, message, capsys):
    with pytest.raises(gr.Error) as caught:
        visitor.run(**({"steps": 2} | changed))
    assert message in caught.value.message and "\n" not in caught.value.message.strip()
    assert caught.value.title == "This cannot be drawn" and "Traceback" not in capsys.readouterr().err
    caught.value.message.encode()  # what cannot be encoded never reaches the browser
    ended()
    assert not visitor.page.stops


def test_a_bad_setting_is_named(visitor):
    interval = Setting("interval", "number", 2, "", whole=True)
    for raw in (0, -1, 2.5, "x", None, float("nan")):
        with pytest.raises(gr.Error, match="interval"):
            visitor.run([("cache", interval, raw)], steps=2)
    words = Setting("interval", "text", None, "")
    for raw in ("x" * 100_000, [1], {"a": 1}, "[" * 5000):
        with pytest.raises(gr.Error, match="interval") as caught:
            visitor.run([("cache", words, raw)], steps=2)
        assert len(caught.value.message) < 300
    with pytest.raises(gr.Error, match=r"cache\.compute_steps: field required"):
        visitor.run(cache="static", steps=2)


def test_control_characters_are_drawn(visitor):
    shown = visitor.run(prompt="a red\x00 circle\x1b[31m \u202e 🟥", steps=2)
    assert shown[-1]["slider"]["visible"] and "NUL" in shown[-1]["command"]


def test_after_bad_input_the_page_works(visitor):
    assert visitor.run(steps=2)[-1]["slider"]["visible"]


def test_a_bug_is_a_message_and_the_terminal_has_the_traceback(visitor, monkeypatch, capsys):
    def broken(*_):
        raise ZeroDivisionError("<oops>")
        yield

    monkeypatch.setattr(visitor.page.easel, "draw", broken)
    with pytest.raises(gr.Error, match="ZeroDivisionError: &lt;oops&gt;"):
        visitor.run(steps=2)
    assert "Traceback" in capsys.readouterr().err


def test_randomised_seeds_differ_and_are_shown(visitor):
    found = [visitor.page.order(visitor.given | {"randomise": True}, []) for _ in range(2)]
    assert found[0][1] != found[1][1] and found[0][0].sampling.seed == found[0][1]


def test_a_shared_page_loads_what_it_offers_and_reads_no_paths(tmp_path):
    page = Page([], tmp_path, shared=True)
    page.blocks()
    assert not page.inputs["model"].allow_custom_value
    asked = Order("somebody/model", {"preset": "fast"}, sampling({"prompt": "x"}))
    with pytest.raises(FastdiffError, match="not served here"):
        list(page.easel.draw(asked, threading.Event()))
    with gr.Blocks():
        found = page._section(Ground("lossless", "shapes-unet"), "cache", "teacache")
    assert "plan" not in {setting.name for _, setting in found.values()}


def test_every_field_takes_input(visitor):
    """Gradio makes a part read-only that is an output of the static events and an input of none."""
    assert all(part.interactive for part in visitor.page.inputs.values())


def test_what_a_step_takes_is_not_counted_as_its_preview_s(monkeypatch):
    """A device has the step to do when the host comes to the preview, whose seconds are taken off the run's."""
    now = [0.0]

    def takes(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(easels, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(easels, "settle", lambda device: takes(5.0))
    watch = easels._Watch("", SimpleNamespace(picture=lambda latents: takes(1.0)), threading.Event(), lambda _: None)
    for step in range(3):
        watch.show(None, step, None, {"latents": torch.zeros(1)})
    assert watch.seconds == 3.0
