"""What somebody asked the page for, and the words that ask for the same elsewhere."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from fastdiff.config import METHOD_KINDS, Config, Layer, layers_of, resolve
from fastdiff.errors import BadConfig
from fastdiff.images import Replay, Sampling, sentence
from fastdiff.registry import registry
from fastdiff.studio.drawing import described

EXACT = 2**53  # whole numbers that a browser can hold


@dataclass(frozen=True)
class Order:
    """A picture, and how to make it faster: `choice` is a config as in a file, on a preset."""

    model: str
    choice: Mapping[str, Any]
    sampling: Sampling

    @property
    def layers(self) -> list[Layer]:
        return layers_of(self.choice)

    def python(self, made: Replay, fps: float | None = None) -> str:
        """A program that draws the picture again, or the video of so many frames a second."""
        call: dict[str, Any] = {"num_inference_steps": made.steps, "guidance_scale": made.guidance_scale}
        call |= {"width": made.width, "height": made.height, "negative_prompt": made.negative_prompt}
        call["num_frames"] = made.frames
        given = "".join(f"    {name}={value!r},\n" for name, value in call.items() if value is not None)
        config = self.choice["preset"] if set(self.choice) == {"preset"} else dict(self.choice)
        what, kept = "image", 'images[0]\nimage.save("out.png")'
        if fps is not None:
            what, kept = "frames", f'frames[0]\nexport_to_video(frames, "out.mp4", fps={fps:g})'
        return (
            "import fastdiff\nimport torch\n"
            + ("from diffusers.utils import export_to_video\n\n" if fps is not None else "\n")
            + f"pipe = fastdiff.load({self.model!r})\nfast = fastdiff.accelerate(pipe, {config!r})\n"
            f"{what} = pipe(\n    prompt={made.prompt!r},\n{given}"
            f'    generator=torch.Generator("cpu").manual_seed({made.seed}),\n).{kept}\nprint(fast.report)\n'
        )

    def command(self, made: Replay) -> str:
        """A command line that draws the picture again."""
        words = ["fastdiff", "generate", "-m", self.model, "--preset", str(self.choice["preset"])]
        for section, table in self.choice.items():
            if section != "preset":
                items = {section: table} if table is None else {f"{section}.{k}": v for k, v in table.items()}
                words += [w for key, value in items.items() for w in ("--set", f"{key}={_text(value)}")]
        words += ["--seed", str(made.seed), "--steps", str(made.steps)]
        words += ["--width", str(made.width), "--height", str(made.height)]
        for option, value in (("--frames", made.frames), ("--fps", made.fps)):
            words += [] if value is None else [option, f"{value:g}"]
        if made.guidance_scale is not None:
            words += ["--guidance-scale", str(made.guidance_scale)]
        if made.negative_prompt is not None:
            words.append(f"--negative-prompt={made.negative_prompt}")
        if "\0" in f"{made.prompt}{made.negative_prompt}":
            return "# this prompt holds a NUL character, which no command line can"
        return shlex.join([*words, "--", made.prompt])


def _text(value: Any) -> str:
    """A value that `--set` reads as the same."""
    return value if isinstance(value, str) and not _is_json(value) and value == value.strip() else json.dumps(value)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def sampling(values: Mapping[str, Any]) -> Sampling:
    """The picture that was asked for, of what the fields hold. Raises BadConfig."""
    given = {name: int(v) if isinstance(v, float) and v.is_integer() else v for name, v in values.items()}
    given = {name: value for name, value in given.items() if value is not None and value != ""}
    for name, value in given.items():
        if isinstance(value, str) and not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:
                raise BadConfig(f"the {name} holds half of a character (a lone surrogate); type it again") from None
    if isinstance(given.get("seed"), int) and given["seed"] > EXACT:
        raise BadConfig(f"seed {given['seed']} is more than a browser holds exactly; give at most {EXACT}")
    try:
        return Sampling.model_validate({"prompt": "", **given})
    except ValidationError as error:
        raise BadConfig(sentence(error)) from None


@dataclass(frozen=True)
class Ground:
    """A preset on a model: what every setting is before anybody changes it."""

    preset: str
    model: str

    def config(self, choice: Mapping[str, Any] | None = None) -> Config:
        return resolve(layers_of({"preset": self.preset, **(choice or {})}), described(self.model), self.model).config

    def method(self, kind: str) -> str | None:
        own = getattr(self.config(), kind)
        return None if own is None else own.method

    def values(self, section: str, method: str | None = None) -> dict[str, Any]:
        """The settings of a section, with `method` where it has methods; what is required is missing."""
        if section not in METHOD_KINDS:
            return getattr(self.config(), section).model_dump(mode="json")
        if method is None:
            return {}
        try:
            return getattr(self.config({section: {"method": method}}), section).model_dump(mode="json")
        except BadConfig:  # it has no default for something
            bare: Any = registry(section)[method]
            return bare.model_construct().model_dump(mode="json", warnings=False)

    def chosen(self, levers: Mapping[str, str | None], entered: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """A config as small as can be: the preset, the methods that are not its own, the settings that differ.

        `levers` has the method of each kind, None for none; `entered` the values of each section that has fields.
        """
        choice: dict[str, Any] = {"preset": self.preset}
        for kind, name in levers.items():
            if name != self.method(kind):
                choice[kind] = None if name is None else {"method": name}
        for section, values in entered.items():
            before = self.values(section, levers.get(section))
            if changed := {name: value for name, value in values.items() if _differ(value, before.get(name))}:
                choice[section] = ({"method": levers[section]} if section in levers else {}) | changed
        return choice


def _differ(value: Any, before: Any) -> bool:
    return value != before or isinstance(value, bool) != isinstance(before, bool)
