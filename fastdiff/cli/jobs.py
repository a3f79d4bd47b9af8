"""What `generate` is asked to draw, and the files it goes to; checked before any model is loaded."""

from __future__ import annotations

import json
import re
import secrets
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fastdiff.errors import BadConfig, FastdiffError, UnknownName
from fastdiff.images import Replay, Sampling, numbered, read, sentence

MAX_COUNT = 10_000


def given(**flags: Any) -> dict[str, Any]:
    """Only the flags that were used."""
    return {name: value for name, value in flags.items() if value is not None}


def replayed(image: Path, model: str | None) -> Replay:
    """The settings in a PNG; a model from somebody's local directory must be named again."""
    made = read(image)
    if made.local and model is None:
        raise BadConfig(
            f"{image.name} was made with a model in a local directory, {made.model[2:]!r}; say where it is with -m"
        )
    return made


def base(made: Replay | None, flags: dict[str, Any]) -> dict[str, Any]:
    """What every image shares: flags over the settings of the PNG that is made again."""
    return (made.model_dump(include=set(Sampling.model_fields)) if made else {}) | flags


def collect(
    prompts: Sequence[str], prompt_file: Path | None, shared: dict[str, Any], seeds: Sequence[int], count: int
) -> list[Sampling]:
    """Every image to make, prompt by prompt, seed by seed; each has a seed."""
    if not 1 <= count <= MAX_COUNT:
        raise BadConfig(f"-n {count}: give 1 to {MAX_COUNT} images a prompt")
    asked: list[tuple[str, dict[str, Any]]] = [("", {"prompt": prompt}) for prompt in prompts]
    if prompt_file is not None:
        asked += _read(prompt_file)
    if not asked and "prompt" in shared:
        asked = [("", {})]
    if not asked:
        nothing = f"{prompt_file} holds no prompt" if prompt_file else "nothing to draw"
        raise BadConfig(f"{nothing}; give a PROMPT, --prompt-file with at least one, or --from-image")
    first = list(seeds) or [shared.get("seed", secrets.randbelow(2**32))]
    jobs = []
    for where, values in asked:
        starts = [values["seed"]] if values.get("seed") is not None else first
        checked = [_sampling(where, shared | values | {"seed": start}) for start in starts]
        every = dict.fromkeys(job.seed + k for job in checked for k in range(count) if job.seed is not None)
        jobs += [_sampling(where, shared | values | {"seed": seed}) for seed in every]
    return jobs


def _sampling(where: str, values: dict[str, Any]) -> Sampling:
    unknown = next((key for key in values if key not in Sampling.model_fields), None)
    if unknown is not None:
        raise BadConfig(f"{where}{UnknownName('key', unknown, Sampling.model_fields)}")
    try:
        return Sampling.model_validate(values)
    except ValidationError as error:
        raise BadConfig(f"{where}{sentence(error)}") from None


def _read(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Prompts of a file, each with the words that place it in an error message."""
    try:
        text = sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise BadConfig(f"--prompt-file {path} is not UTF-8 text") from None
    except OSError as error:
        raise BadConfig(f"--prompt-file {path} cannot be read: {error.strerror}") from None
    lines = [(n, line.strip()) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
    is_json = path.suffix == ".jsonl" or (str(path) == "-" and bool(lines) and lines[0][1].startswith("{"))
    if not is_json:
        return [(f"{path} line {n}: ", {"prompt": line}) for n, line in lines]
    return [(f"{path} line {n}: ", _parse(f"{path} line {n}: ", line)) for n, line in lines]


def _parse(where: str, line: str) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadConfig(f"{where}not JSON: {getattr(error, 'msg', error)}") from None
    if not isinstance(values, dict) or "prompt" not in values:
        raise BadConfig(f'{where}needs an object with a prompt, like {{"prompt": "a red circle", "seed": 1}}')
    return values


def targets(output: str, jobs: Sequence[Sampling]) -> list[Path]:
    """A path for each image, all different, where files can be written; a folder to make is made by `make_folder`."""
    path = Path(output).expanduser()
    if output.endswith("/") or path.is_dir():
        names = [path / f"{_slug(job.prompt)}_seed_{job.seed}.png" for job in jobs]
    elif path.suffix.lower() != ".png":
        raise BadConfig(f"-o {output}: end the name in .png, or in / for a directory")
    else:
        names = [path if len(jobs) == 1 else path.with_name(f"{path.stem}_seed_{job.seed}.png") for job in jobs]
    _check_writable(path if path.is_dir() else path.parent)
    return list(_distinct(names))


def _distinct(paths: Sequence[Path]) -> Iterator[Path]:
    taken: set[Path] = set()
    for path in paths:
        free = next(p for p in numbered(path) if p not in taken)
        taken.add(free)
        yield free


def _slug(prompt: str) -> str:
    return re.sub(r"\W+", "-", prompt.lower()).strip("-")[:40].rstrip("-") or "image"


def make_folder(folder: Path) -> None:
    """Called when nothing is left to refuse, so that a mistake leaves no empty folder behind."""
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise FastdiffError(f"-o {folder}: cannot be created: {error.strerror}") from None


def _check_writable(folder: Path) -> None:
    if not folder.is_dir():
        raise FastdiffError(f"output directory {str(folder)!r} does not exist; create it first, or choose another -o")
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise FastdiffError(f"output directory {str(folder)!r} is not writable: {error.strerror}") from None
