"""Pages of single models, docs/flux.md and its like: every option on them parses, tiny models take the settings."""

from __future__ import annotations

import re
import shlex
from typing import Any

import pytest
import typer

import fastdiff
from fastdiff.cli import app
from fastdiff.config import resolve
from fastdiff.pipelines.families import anatomies
from fastdiff.studio.settings import layers
from tests import tiny
from tests.packaging.tree import ROOT
from tests.zoo_images import ZOO

MODELS = {
    "flux": lambda: tiny.make("flux"), "sdxl": lambda: tiny.make("sdxl"), "wan": lambda: tiny.make("wan"),
    "qwen-image": lambda: ZOO["qwen image"].make(),
}  # fmt: skip


def options(page: str) -> list[list[str]]:
    """What is typed after `fastdiff generate PROMPT`: in blocks, and in sentences and tables."""
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^fastdiff generate (.*)$", text, re.M)
    found = [shlex.split(line)[1:] for line in blocks]
    return found + [shlex.split(code) for code in re.findall(r"`(-[-\w][^`]*)`", text)]


def parsed(words: list[str]) -> Any:
    """Of `fastdiff generate "a fox"` and these words. Raises what the command line says of others."""
    root = typer.main.get_command(app)
    with root.make_context("fastdiff", [], resilient_parsing=True) as context:
        return root.commands["generate"].make_context("generate", ["a fox", *words], parent=context)


@pytest.mark.parametrize("page", [*MODELS, "own-models", "from-others"])
def test_options_parse(page: str) -> None:
    whole = [words for words in options(page) if len(words) > 1]
    assert len(whole) >= 5
    for words in whole:
        context = parsed(words)
        given = {name for name in context.params if context.get_parameter_source(name).name == "COMMANDLINE"}
        assert given > {"prompts"}, words


def test_what_is_no_option_does_not_parse() -> None:
    with pytest.raises(Exception, match="No such option"):
        parsed(["--no-such-option", "1"])


@pytest.mark.parametrize("page", MODELS)
def test_a_tiny_model_takes_the_settings(page: str) -> None:
    pipe, tried = MODELS[page](), 0
    for words in options(page):
        given = parsed(words).params
        if given["sets"] or given["preset"]:
            config = resolve(layers(given["preset"], None, None, None, given["sets"] or [], given["devices"]),
                             anatomies(pipe)[0].family).config  # fmt: skip
            if config.parallel is None:
                with fastdiff.accelerate(pipe, config) as fast:
                    assert fast.config.cache or fast.config.quant
            tried += 1
    assert tried >= 5
