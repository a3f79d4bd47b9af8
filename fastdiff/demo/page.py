"""The page: what is asked, what comes of it, and a second tab with a benchmark."""

from __future__ import annotations

import secrets
import tempfile
import traceback
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from threading import Event
from typing import Any

import gradio as gr

from fastdiff.config import METHOD_KINDS, OFF, PATH_KEYS, Attention, Compile, presets
from fastdiff.errors import FastdiffError
from fastdiff.media import Clip, save, suffix
from fastdiff.pipelines.loading import CALL_DEFAULTS
from fastdiff.registry import registry

from . import films
from .easel import Cancelled, Easel, Pair, Progress, offered
from .fields import Setting, settings_of
from .order import Ground, Order, sampling
from .results import NO_BENCHMARK, benchmarks, captions, explanation, pareto, progress

LIVE: dict[str, Any] = {"interactive": True}  # Gradio guesses from the static events, and Run's is none of them
VISITORS = 24  # who draw or are told that they wait; more are refused, as Cancel reaches nobody in Gradio's own queue
PROMPT = "a large red circle above a small blue square"
CROWDED = "Too many people draw here at the moment; try again later."
HEARD = "() => ({__type__: 'update', interactive: document.querySelector('#cancel').disabled})"
SECTIONS: Mapping[str, Any] = {"attention": Attention, "compile": Compile}
OUTPUTS = (
    "status",
    "preview",
    "slider",
    "films",
    "left",
    "right",
    "numbers",
    "copy",
    "python",
    "command",
    "seed",
    "run",
    "cancel",
)
SAMPLED = ("prompt", "negative_prompt", "steps", "guidance_scale", "width", "height", "frames", "fps")
KINDS = {"cache": "Caching", "parallel": "Parallel", "quant": "Quantization", "solver": "Solver"}
THEME = gr.themes.Default(  # fonts that are at hand, text dark enough to read
    primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
).set(
    block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_300",
    block_label_text_color="*neutral_700", block_title_text_color="*neutral_800",
    button_primary_background_fill="*primary_700", button_primary_background_fill_hover="*primary_800",
)  # fmt: skip
CSS = """
.gradio-container { width: 100%; max-width: 1100px !important; margin: 0 auto; }
#ask, #which { align-items: end; }
#ask button { padding-inline: 4px; }
#prompt textarea { field-sizing: content; height: auto !important; max-height: 8em; }
#status .progress { display: flex; flex-direction: column; gap: 4px; }
#status progress { width: 100%; height: 12px; accent-color: #1d4ed8; }
#status .captions { display: flex; flex-wrap: wrap; gap: 4px 24px; font-size: 110%; }
#preview img { width: 100%; height: 100%; object-fit: contain; }
#explain .numbers { border-collapse: collapse; margin-top: 12px; }
#explain .numbers th, #explain .numbers td { padding: 4px 12px; text-align: left; }
#rows { overflow-x: auto; }
#rows th, #rows td { white-space: nowrap; padding: 4px 10px; }
"""


@contextmanager
def told() -> Iterator[None]:
    """Errors as messages on the page; the traceback of a bug goes to the terminal only."""
    try:
        yield
    except FastdiffError as error:
        raise gr.Error(escape(_printable(error)), title="This cannot be drawn", print_exception=False) from None
    except (gr.Error, GeneratorExit, Cancelled):
        raise
    except Exception as error:
        traceback.print_exc()
        text = f"{type(error).__name__}: {_printable(error)[:300]}. The terminal has the details."
        raise gr.Error(escape(text), title="Something went wrong", print_exception=False) from None


def followed(given: Mapping[str, Any], fields: Mapping[str, Any]) -> None:
    """Raises gr.Error while the page is still on its way to a new preset, method or model: its methods, or the fields
    that Run sends, are yet those of `fields`."""
    if any(given[name] != value for name, value in fields.items()):
        raise gr.Error("The fields of the new settings are not there yet; press Run again.", title="Too soon",
                       print_exception=False)  # fmt: skip


def buttons(drawing: bool = False) -> dict[str, Any]:
    return {"run": gr.update(interactive=not drawing), "cancel": gr.update(interactive=drawing)}


def _printable(error: object) -> str:
    return str(error).encode("utf-8", "replace").decode()


def _defaults(model: str) -> tuple[str, str]:
    """Steps and guidance of an embedded model; of others nobody knows before they are loaded."""
    values = CALL_DEFAULTS.get(model, {})
    return str(values.get("num_inference_steps", "")), str(values.get("guidance_scale", ""))


@dataclass
class Page:
    """The state of one page server: the easel, and a way to stop each visitor's run."""

    models: list[str]
    place: Path
    shared: bool = False
    easel: Easel = field(init=False)
    stops: dict[str, Event] = field(default_factory=dict)
    inputs: dict[str, Any] = field(default_factory=dict)  # parts of the page by name, filled while it is built
    out: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.models = offered(self.models)
        self.easel = Easel(self.models if self.shared else None)

    def blocks(self) -> gr.Blocks:
        with gr.Blocks(title="fastdiff", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
            gr.Markdown("# fastdiff\nThe same picture from the same seed, without and with acceleration.")
            with gr.Tab("Draw"):
                self._drawing(page)
            with gr.Tab("Benchmark"):
                self._benchmark(page)
        return page

    def _drawing(self, page: gr.Blocks) -> None:
        with gr.Row(elem_id="ask"):
            prompt = gr.Textbox(
                PROMPT, label="Prompt", lines=1, max_lines=4, scale=5, min_width=150, elem_id="prompt", **LIVE
            )
            run = gr.Button("Run", variant="primary", scale=1, min_width=64, elem_id="run", interactive=False)
            cancel = gr.Button("Cancel", scale=1, min_width=64, elem_id="cancel", interactive=False)
            self.out.update(run=run, cancel=cancel)
        with gr.Accordion("Advanced settings", open=False, elem_id="advanced"):
            self.inputs.update(self._asked(), prompt=prompt)
            self.inputs.update(self._levers())
            self._fields(page)
        status = gr.HTML("", elem_id="status", container=False)
        preview = gr.Image(label="Preview of the latents", alt_text="preview", format="png", interactive=False,
                           visible=False, elem_id="preview", height=280, buttons=[])  # fmt: skip
        slider = gr.ImageSlider(label="Left: without, right: accelerated", format="png", type="filepath",
                                interactive=False, visible=False, elem_id="result", max_height=420)  # fmt: skip
        shown = films.places()
        numbers = gr.HTML("", elem_id="explain")
        with gr.Accordion("Copy", open=False, visible=False, elem_id="copy") as copy:
            python = gr.Code(
                label="Copy as Python", language="python", interactive=False, max_lines=20, elem_id="as-python"
            )
            command = gr.Code(label="Copy as command", language="shell", interactive=False, wrap_lines=True,
                              lines=2, max_lines=8, elem_id="as-command")  # fmt: skip
        self.out.update(status=status, preview=preview, slider=slider, numbers=numbers, copy=copy, python=python,
                        command=command, seed=self.inputs["seed"], **shown)  # fmt: skip

    def _asked(self) -> dict[str, Any]:
        steps_now, guidance_now = _defaults(self.models[0])
        # text: a Number cannot start out empty
        hint = LIVE | {"info": "empty: as the model wants it", "min_width": 160}
        with gr.Row():
            model = gr.Dropdown(self.models, value=self.models[0], label="Model", elem_id="model", **LIVE,
                                min_width=160, allow_custom_value=not self.shared,
                                info=None if self.shared else "or type a directory or a hub id")  # fmt: skip
            steps = gr.Textbox(steps_now, label="Steps", elem_id="steps", **hint)
            guidance = gr.Textbox(guidance_now, label="Guidance scale", elem_id="guidance", **hint)
        with gr.Row():
            width = gr.Textbox("", label="Width", elem_id="width", **hint)
            height = gr.Textbox("", label="Height", elem_id="height", **hint)
            seed = gr.Number(
                1, label="Seed", info="the same seed, the same picture", elem_id="seed", **LIVE, min_width=160
            )
            randomise = gr.Checkbox(False, label="Randomise the seed", elem_id="randomise", **LIVE, min_width=160)
        with gr.Row():
            frames = gr.Textbox("", label="Frames", elem_id="frames", **hint | {"info": "of a video"})
            fps = gr.Textbox("", label="Frames a second", elem_id="fps", **hint | {"info": "of a video"})
            negative = gr.Textbox("", label="Negative prompt", elem_id="negative", **LIVE, max_lines=4, scale=2)
        model.change(_defaults, model, [steps, guidance], show_progress="hidden", api_visibility="private")
        return {"model": model, "steps": steps, "guidance_scale": guidance, "seed": seed, "randomise": randomise,
                "width": width, "height": height, "frames": frames, "fps": fps,
                "negative_prompt": negative}  # fmt: skip

    def _levers(self) -> dict[str, Any]:
        """The preset, and a method of each kind that there is."""
        named = [(name, name) for name in presets()]
        ground = Ground("balanced", self.models[0])
        with gr.Row():
            preset = gr.Dropdown(named, value=ground.preset, label="Preset", elem_id="preset", **LIVE, min_width=160,
                                 info="choosing one sets the methods below")  # fmt: skip
            found = {"preset": preset}
            for kind in METHOD_KINDS:
                found[kind] = gr.Dropdown([OFF, *registry(kind)], value=ground.method(kind) or OFF, min_width=160,
                                          label=KINDS[kind], elem_id=kind, **LIVE, info="method")  # fmt: skip

        shown = gr.Textbox(ground.preset, visible="hidden", **LIVE)  # the preset that the methods are those of

        def methods(name: str, model: str) -> list[str]:
            with told():
                return [*(Ground(name, model).method(kind) or OFF for kind in METHOD_KINDS), name]

        preset.change(methods, [preset, self.inputs["model"]], [*(found[kind] for kind in METHOD_KINDS), shown],
                      show_progress="hidden", api_visibility="private")  # fmt: skip
        return found | {"shown": shown}

    def _fields(self, page: gr.Blocks) -> None:
        """Settings of the chosen methods, drawn anew when a method is chosen; Run reads them, so it is tied here.

        Cancel only asks the run to stop: `cancels=` would cut its stream, and its last update could come after that.
        """
        self.out["cancel"].click(self.cancel, None, None, show_progress="hidden", api_visibility="private", queue=False)
        names = ("model", "shown", *METHOD_KINDS)
        by_hand = [self.inputs[kind].input for kind in METHOD_KINDS]  # those that a preset sets come with `shown`
        changes = [page.load, self.inputs["model"].change, self.inputs["shown"].change, *by_hand]

        # one at a time: two at once take each other's parts away
        @gr.render([self.inputs[name] for name in names], changes, concurrency_limit=1, show_progress="hidden")
        def fields(model: str, preset: str, *methods: str) -> None:
            entries: dict[Any, tuple[str, Setting]] = {}
            with told():
                ground = Ground(preset, model)
                for section, name in [*zip(METHOD_KINDS, methods, strict=True), *((s, s) for s in SECTIONS)]:
                    entries |= self._section(ground, section, name)
            inputs = {*self.inputs.values(), *entries}
            out = [self.out[name] for name in OUTPUTS]

            def draw(data: dict[Any, Any], request: gr.Request) -> Iterator[dict[Any, Any]]:
                given = {name: data[part] for name, part in self.inputs.items()}
                followed(given, dict(zip(names, (model, preset, *methods), strict=True)) | {"preset": preset})
                yield from self.draw(given, [(*entry, data[part]) for part, entry in entries.items()], request)

            shared = {"show_progress": "hidden", "api_visibility": "private"}
            gr.on([self.out["run"].click, self.inputs["prompt"].submit], draw, inputs, out, concurrency_limit=None,
                  trigger_mode="once", **shared)  # fmt: skip
            gr.on(None, None, None, self.out["run"], js=HEARD, **shared)  # now it can be

    def _section(self, ground: Ground, section: str, name: str) -> dict[Any, tuple[str, Setting]]:
        """The fields of one lever, with where each belongs."""
        if name == OFF:
            return {}
        model = SECTIONS.get(section) or registry(section)[name]
        values = ground.values(section, None if section in SECTIONS else name)
        leave_out = {"method", *(PATH_KEYS if self.shared else ())}
        settings = settings_of(model, values, leave_out)
        title = section.capitalize() if section in SECTIONS else f"{KINDS[section]}: {name}"
        found: dict[Any, tuple[str, Setting]] = {}
        with gr.Accordion(title, open=section in ("cache", "quant", "solver"), key=f"{section}/{name}"), gr.Row():
            for setting in settings:
                key = f"{ground.model}/{ground.preset}/{section}/{name}/{setting.name}"
                found[setting.component(section, key)] = (section, setting)
        return found

    def draw(
        self, given: Mapping[str, Any], entered: list[tuple[str, Setting, Any]], request: gr.Request
    ) -> Iterator[dict[Any, Any]]:
        """Everything the page shows while a pair of pictures is drawn, and then."""
        visitor = request.session_hash or ""
        if visitor in self.stops or len(self.stops) >= VISITORS:
            why = "Your picture is being drawn; cancel it first." if visitor in self.stops else CROWDED
            raise gr.Error(why, title="Busy", print_exception=False)
        stop = self.stops[visitor] = Event()
        try:
            with told():
                order, seed = self.order(given, entered)
                hidden = {name: gr.update(visible=False) for name in ("slider", "films")}
                yield self.shows(seed=seed, status=progress(Progress("Starting")), **hidden, **buttons(drawing=True))
                with closing(self.easel.draw(order, stop)) as running:
                    for said in running:
                        if isinstance(said, Pair):
                            yield from self._pair(order, said)
                        elif stop.is_set():
                            yield self.shows(status=progress(Progress("Stopping")))
                        else:
                            picture = {"preview": gr.update(value=said.preview, visible=True)} if said.preview else {}
                            yield self.shows(status=progress(said), **picture)
        except Cancelled:
            yield self.shows(status="<p>Cancelled.</p>", preview=gr.update(value=None, visible=False), **buttons())
        except gr.Error:
            yield self.shows(status="", preview=gr.update(visible=False), **buttons())
            raise
        finally:
            if self.stops.get(visitor) is stop:  # not that of the run which followed
                del self.stops[visitor]

    def order(self, given: Mapping[str, Any], entered: list[tuple[str, Setting, Any]]) -> tuple[Order, int]:
        """What the fields ask for, and the seed. Raises FastdiffError."""
        seed = secrets.randbelow(2**32) if given["randomise"] or given["seed"] is None else given["seed"]
        asked = sampling({name: given[name] for name in SAMPLED} | {"seed": seed})
        ground = Ground(str(given["preset"]), str(given["model"]).strip())
        values: dict[str, dict[str, Any]] = {}
        for section, setting, raw in entered:
            values.setdefault(section, {})[setting.name] = setting.parsed(raw)
        levers = {kind: None if given[kind] == OFF else given[kind] for kind in METHOD_KINDS}
        return Order(ground.model, ground.chosen(levers, values), asked), asked.seed or 0

    def _pair(self, order: Order, pair: Pair) -> Iterator[dict[Any, Any]]:
        """What was made goes to the browser as files with their settings in them: pictures as PNG, for the slider."""
        for text in pair.warnings:
            gr.Warning(escape(text))
        made = pair.fast.drawn.made
        with tempfile.TemporaryDirectory(prefix="fastdiff-") as folder:
            files = tuple(
                str(save(shot.drawn.image, Path(folder) / f"{name}{suffix(shot.drawn.image)}", shot.drawn.made))
                for name, shot in (("without", pair.plain), ("accelerated", pair.fast))
            )
            clip = pair.fast.drawn.image if isinstance(pair.fast.drawn.image, Clip) else None
            seen = films.shown(files) if clip else {"slider": gr.update(value=files, visible=True)}
            yield self.shows(
                status=captions(pair), preview=gr.update(value=None, visible=False), **seen,
                numbers=explanation(pair), copy=gr.update(visible=True),
                python=order.python(made, clip.fps if clip else None), command=order.command(made), **buttons(),
            )  # fmt: skip

    def cancel(self, request: gr.Request) -> None:
        if (stop := self.stops.get(request.session_hash or "")) is not None:
            stop.set()

    def shows(self, **parts: Any) -> dict[Any, Any]:
        return {self.out[name]: value for name, value in parts.items()}

    def _benchmark(self, page: gr.Blocks) -> None:
        gr.Markdown("Measured with `fastdiff bench`: quality against speed, the frontier joined.")
        with gr.Row(elem_id="which"):
            name = gr.Dropdown(benchmarks(self.place), label="Benchmark", elem_id="benchmark", scale=5, **LIVE)
            again = gr.Button("Read again", elem_id="read-again", scale=1, min_width=80)
        picture = gr.Image(label="Quality against speed-up", show_label=False, format="png", interactive=False,
                           alt_text="Pareto plot; the table below has its numbers", elem_id="pareto",
                           buttons=["download", "fullscreen"])  # fmt: skip
        table = gr.Markdown("", elem_id="rows")

        def show(wanted: str | None) -> tuple[Any, str]:
            with told():
                return pareto(self.place, wanted)

        def listed() -> tuple[Any, Any, Any]:
            with told():
                found = benchmarks(self.place)
                drawn, text = pareto(self.place, found[0]) if found else (None, NO_BENCHMARK)
                return gr.update(choices=found, value=found[0] if found else None), drawn, text

        shared = {"show_progress": "minimal", "api_visibility": "private"}
        name.input(show, name, [picture, table], **shared)
        gr.on([page.load, again.click], listed, None, [name, picture, table], **shared)
