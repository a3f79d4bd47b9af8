"""The page in a real browser: open, draw, move the slider, change the preset, cancel, bad input; desktop and phone."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not (BROWSER and DRIVER), reason="no Chromium and chromedriver; on Debian: apt install both"),
]
REASON = "needs gradio and selenium: pip install 'fastdiff[dev]'"
PATIENCE = 600  # seconds, for machines that are busy


def until(met: Callable[[], Any], what: str) -> Any:
    """The first true value of `met`, whose errors while the page changes do not count."""
    from selenium.common.exceptions import WebDriverException

    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        try:
            if found := met():
                return found
        except WebDriverException:
            pass
        time.sleep(0.1)
    raise AssertionError(f"the browser waited in vain for {what}")


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Iterator[Any]:
    """A served page; its `address` is that of the server."""
    pytest.importorskip("gradio", reason=REASON)
    from fastdiff.demo.page import CSS, THEME, Page

    folder = tmp_path_factory.mktemp("benchmarks")
    shutil.copy(Path(__file__).resolve().parents[2] / "benchmarks" / "shapes-unet.json", folder)
    made = Page([], folder)
    blocks = made.blocks()
    blocks.queue(max_size=16)
    _, made.address, _ = blocks.launch(
        server_name="127.0.0.1", quiet=True, prevent_thread_lock=True, theme=THEME, css=CSS, ssr_mode=False
    )
    yield made
    blocks.close()


@pytest.fixture(scope="module")
def chrome(page) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason=REASON)
    options = webdriver.ChromeOptions()
    for flag in ("headless=new", "disable-dev-shm-usage", "disable-gpu", *(["no-sandbox"] if os.getuid() == 0 else [])):
        options.add_argument(f"--{flag}")
    options.binary_location = BROWSER
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.set_window_size(1200, 1000)
    yield driver
    driver.quit()


def heard(chrome: Any) -> list[dict[str, Any]]:
    """What the browser has asked of servers since this was called last."""
    messages = [json.loads(entry["message"])["message"] for entry in chrome.get_log("performance")]
    return [message for message in messages if message["method"] == "Network.requestWillBeSent"]


class Screen:
    """What a person sees of the page, and does to it."""

    def __init__(self, chrome: Any, page: Any) -> None:
        self.chrome, self.page = chrome, page

    def all(self, selector: str) -> list[Any]:
        return self.chrome.find_elements("css selector", selector)

    def one(self, selector: str) -> Any:
        return until(lambda: next((e for e in self.all(selector) if e.is_displayed()), None), selector)

    def text(self, selector: str) -> str:
        return " ".join(element.text for element in self.all(selector))

    def write(self, name: str, text: str) -> None:
        from selenium.webdriver.common.keys import Keys

        def written() -> bool:
            box = self.one(f"#{name} textarea, #{name} input")
            box.send_keys(Keys.CONTROL, "a")
            box.send_keys(text or Keys.BACKSPACE)
            return True

        until(written, f"{name} to take text")  # what is being unfolded takes none yet

    def choose(self, name: str, value: str) -> None:
        self.one(f"#{name} input").click()
        self.one(f"[role=option][aria-label='{value}']").click()

    def advanced(self) -> None:
        if not any(element.is_displayed() for element in self.all("#steps input, #steps textarea")):
            self.one("#advanced button").click()
        self.one("#steps input, #steps textarea")

    def run(self, steps: int) -> None:
        self.advanced()
        self.write("steps", str(steps))
        self.one("#run").click()

    def drawn(self) -> None:
        until(lambda: "times as" in self.text("#status"), "the captions")


@pytest.fixture
def screen(chrome, page) -> Screen:
    """The page, opened anew."""
    chrome.get(page.address)
    shown = Screen(chrome, page)
    until(lambda: shown.one("#run").is_enabled(), "the settings")
    return shown


def test_draw_with_live_previews_then_move_the_slider(screen, tmp_path):
    screen.run(12)
    until(lambda: screen.all("#status progress[value]"), "the progress bar")
    until(lambda: screen.all("#preview img"), "a preview")
    screen.drawn()
    images = [image.get_attribute("src") for image in screen.all("#result img")]
    assert len(images) == 2 and images[0] != images[1] and all(source.endswith(".png") for source in images)
    assert "12 steps" in screen.one("#explain [role=img]").get_attribute("aria-label")
    assert len(screen.all("#explain [role=img] > span")) == 12
    assert "dB" in screen.text("#explain") or "identical" in screen.text("#explain")
    from selenium.webdriver import ActionChains

    handle = screen.one("#result .outer")
    before = handle.get_attribute("style")
    ActionChains(screen.chrome).click_and_hold(screen.one("#result .outer .inner, #result .outer")).move_by_offset(
        90, 0
    ).release().perform()
    until(lambda: screen.one("#result .outer").get_attribute("style") != before, "the slider to move")
    screen.chrome.save_screenshot(str(tmp_path / "desktop.png"))
    screen.one("#copy button").click()
    until(lambda: "--steps 12" in screen.text("#as-command"), "the command")
    assert "num_inference_steps=12" in screen.text("#as-python")


def test_videos_play_side_by_side(screen, tmp_path):
    from selenium.webdriver.common.keys import Keys

    from tests import tiny

    tiny.make("wan").save_pretrained(tmp_path / "wan")
    screen.advanced()
    screen.write("model", str(tmp_path / "wan"))
    screen.one("#model input").send_keys(Keys.ENTER)
    for name, value in {"guidance": "4", "width": "32", "height": "32", "frames": "9", "fps": "8"}.items():
        screen.write(name, value)
    screen.run(6)
    screen.drawn()
    until(lambda: not screen.all("#result img"), "no slider")
    plain, fast = (screen.one(f"#{name} video") for name in ("without", "accelerated"))
    assert plain.get_attribute("src") != fast.get_attribute("src")
    until(lambda: all(video.get_property("readyState") == 4 for video in (plain, fast)), "the videos to be read")
    assert fast.get_property("videoWidth") == 32 and abs(fast.get_property("duration") - 9 / 8) < 0.2
    assert "dB" in screen.text("#explain") or "identical" in screen.text("#explain")
    screen.chrome.execute_script("arguments[0].scrollIntoView({block: 'center'})", fast)
    screen.chrome.save_screenshot(str(tmp_path / "films.png"))
    screen.one("#copy button").click()
    until(lambda: "--frames 9 --fps 8" in screen.text("#as-command"), "the command")


def test_a_preset_sets_the_methods_and_a_method_brings_its_fields(screen):
    screen.advanced()
    assert screen.one("#cache-interval input").get_attribute("value") == "2"
    screen.choose("preset", "fast")
    until(
        lambda: screen.one("#solver-evaluations input[type=number]").get_attribute("value") == "10",
        "the preset's solver",
    )
    until(lambda: screen.one("#cache input").get_attribute("value") == "off", "no method")
    until(lambda: not screen.all("#cache-interval"), "no fields")
    screen.choose("cache", "fora")
    screen.one("#cache-interval input")
    screen.write("cache-interval", "5")
    screen.run(6)
    screen.drawn()
    assert "2 computed" in screen.one("#explain [role=img]").get_attribute("aria-label")


@pytest.mark.parametrize("after", [pytest.param("Starting", marks=pytest.mark.slow), "step "])
def test_cancel_stops_the_denoising_and_the_next_run_is_clean(screen, monkeypatch, after):
    from fastdiff.demo import easel

    steps, tick = [], easel._Watch.tick
    monkeypatch.setattr(easel._Watch, "tick", lambda *given: (steps.append(given[1]), tick(*given)))
    screen.run(900)
    until(lambda: any(word in screen.text("#status") for word in (after, "step ")), "the run to begin")
    screen.one("#cancel").click()
    until(lambda: "Cancelled" in screen.text("#status"), "the run to end")
    stopped_at = len(steps)
    assert stopped_at < 450
    until(lambda: not screen.page.easel._lock.locked(), "the thread to end")
    assert len(steps) == stopped_at and screen.page.easel._studio.fast.clock.run is None
    assert not screen.page.stops and "Cancelled" in screen.text("#status")
    screen.run(4)
    screen.drawn()
    assert "4 steps" in screen.one("#explain [role=img]").get_attribute("aria-label")


@pytest.mark.parametrize("late", [0.0, pytest.param(1.5, marks=pytest.mark.slow)])
def test_run_before_the_fields_follow_the_preset_draws_nothing_else(screen, monkeypatch, late):
    """`late` seconds after the choice, whose methods take longer to come. Either the picture is that of the new
    preset, or a message says that it is too soon for it."""
    from fastdiff.demo.order import Ground

    method, drawn = Ground.method, []
    monkeypatch.setattr(Ground, "method", lambda *given: (time.sleep(0.8), method(*given))[1])
    monkeypatch.setattr(screen.page.easel, "draw", lambda order, stop: (None for _ in drawn.append(order.choice) or ()))
    screen.advanced()
    screen.choose("preset", "lossless")
    time.sleep(late)
    screen.one("#run").click()
    until(lambda: "press Run again" in screen.text("[data-testid=toast-body]"), "the message")
    assert drawn == []
    until(lambda: screen.one("#cache input").get_attribute("value") == "off", "no method")
    until(lambda: screen.one("#run").click() or drawn, "the picture")
    assert drawn[0] == {"preset": "lossless"}


def test_a_run_goes_on_while_a_preset_is_chosen_and_keeps_cancel(screen):
    """New fields come with a new Run, which knows of no earlier one."""
    screen.run(900)
    until(lambda: "step " in screen.text("#status"), "the run to begin")
    screen.choose("preset", "fast")
    until(
        lambda: screen.one("#solver-evaluations input[type=number]").get_attribute("value") == "10",
        "the preset's solver",
    )
    assert screen.one("#cancel").is_enabled() and not screen.one("#run").is_enabled()
    screen.one("#prompt textarea").send_keys("\n")
    until(lambda: "cancel it first" in screen.text("[data-testid=toast-body]"), "the message")
    screen.one("#cancel").click()
    until(lambda: "Cancelled" in screen.text("#status"), "the run to end")
    assert screen.one("#run").is_enabled() and not screen.one("#cancel").is_enabled()


def test_cancel_reaches_who_waits_behind_many(screen, chrome):
    """Nine others wait already; they send what this browser sent, which itself keeps six connections at most."""
    import httpx

    with screen.page.easel._lock:
        screen.one("#run").click()
        until(lambda: "Waiting for another picture" in screen.text("#status"), "the news that others wait")
        asked = [message["params"]["request"] for message in heard(chrome)]
        sent = [(request["url"], json.loads(request["postData"])) for request in asked if "postData" in request]
        mine = next(iter(screen.page.stops))
        for number in range(9):
            for url, body in sent:
                if body.get("session_hash") == mine and "fn_index" in body:
                    said = body | {"session_hash": f"other{number}"}
                    until(lambda url=url, said=said: httpx.post(url, json=said).is_success, "the fields to be there")
        until(lambda: len(screen.page.stops) == 10, "all others to wait too")
        screen.one("#cancel").click()
        until(lambda: "Cancelled" in screen.text("#status"), "the end of this one")
        assert {*screen.page.stops} == {f"other{number}" for number in range(9)}
        screen.one("#run").click()
        until(lambda: "Waiting for another picture" in screen.text("#status"), "the news that others wait")
        for stop in list(screen.page.stops.values())[:9]:
            stop.set()
    screen.drawn()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("prompt", "", "the prompt is empty"),
        pytest.param("steps", "-3", "steps = -3", marks=pytest.mark.slow),
        pytest.param("width", "65", "multiples of 8", marks=pytest.mark.slow),
        ("model", "<img src=x onerror=document.title='hacked'>", "unknown model"),
    ],
)
def test_bad_input_is_a_message(screen, name, text, message):
    screen.advanced()
    screen.write("steps", "2")
    screen.write(name, text)
    if name == "model":
        from selenium.webdriver.common.keys import Keys

        screen.one("#model input").send_keys(Keys.ENTER)

    def said() -> bool:
        """Asked again each time: while the fields of another model are on their way, Run says so and does nothing."""
        screen.one("#run").click()
        end = time.monotonic() + 2
        while not (found := message in screen.text("[data-testid=toast-body]")) and time.monotonic() < end:
            time.sleep(0.1)
        return found

    until(said, message)
    assert "Traceback" not in screen.chrome.page_source and screen.chrome.title == "fastdiff"


def test_the_second_tab_shows_a_benchmark(screen):
    next(tab for tab in screen.all("[role=tab]") if tab.text == "Benchmark").click()
    until(lambda: "baseline" in screen.text("#rows"), "the table")
    assert screen.one("#pareto img").get_attribute("alt")


def test_every_field_has_a_label(screen):
    screen.advanced()
    unnamed = """
        return [...document.querySelectorAll('input, textarea, select, button')].filter(e => e.offsetParent !== null)
          .filter(e => !(e.ariaLabel || e.title || e.innerText || (e.labels && e.labels.length) ||
                         e.getAttribute('aria-labelledby')))
          .map(e => e.outerHTML.slice(0, 200))"""
    assert screen.chrome.execute_script(unnamed) == []


def test_on_a_phone_nothing_is_cut_off(screen, tmp_path):
    metrics = {"width": 375, "height": 812, "deviceScaleFactor": 2, "mobile": True}
    screen.chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        screen.advanced()
        screen.chrome.save_screenshot(str(tmp_path / "phone.png"))
        wide = """
            return [...document.querySelectorAll('input, textarea, button, img')].filter(e => e.offsetParent !== null)
              .filter(e => { const r = e.getBoundingClientRect(); return r.right > innerWidth + 1 || r.left < -1 })
              .map(e => e.outerHTML.slice(0, 200))"""
        assert screen.chrome.execute_script(wide) == []
        assert screen.chrome.execute_script("return document.documentElement.scrollWidth") <= 375
        prompt, run = screen.one("#prompt textarea, #prompt input"), screen.one("#run")
        assert prompt.location["y"] < run.location["y"] + run.size["height"], "prompt and Run are in one row"
    finally:
        screen.chrome.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_nothing_is_fetched_from_elsewhere(screen):
    """Fonts, scripts and pictures come from this machine: the page works offline and tells nobody."""
    asked = {message["params"]["request"]["url"] for message in heard(screen.chrome)}
    outside = {url for url in asked if url.startswith(("http", "ws")) and "127.0.0.1" not in url.split("/")[2]}
    assert asked and outside == set()
