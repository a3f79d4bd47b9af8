"""What `generate` is asked to draw, and the files it goes to; checked before any model is loaded."""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import sys
import tempfile
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fastdiff.errors import BackendUnavailable, BadConfig, FastdiffError, UnknownName
from fastdiff.images import Replay, Sampling, numbered, sentence
from fastdiff.media import ALL, read

MAX_COUNT = 10_000


@dataclass(frozen=True)
class Asked:
    """One image of a list, or the mistake that keeps it from being drawn; `where` places it in the list."""

    where: str
    sampling: Sampling | None
    mistake: BadConfig | None = None


def given(**flags: Any) -> dict[str, Any]:
    """Only the flags that were used."""
    return {name: value for name, value in flags.items() if value is not None}


def replayed(image: Path, model: str | None, again: Collection[str] = ()) -> Replay:
    """The settings in a file; what lay on somebody's disk must be named `again`: a model, pictures, LoRA."""
    made = read(image)
    if made.local and model is None:
        raise BadConfig(
            f"{image.name} was made with a model in a local directory, {made.model[2:]!r}; say where it is with -m"
        )
    for option, name in [*made.pictures, *(("lora", name) for name in made.outfit.get("lora", ()))]:
        if option not in again:
            raise BadConfig(f"{image.name} was made with {name!r}; say where it is with --{option}")
    return made


def base(made: Replay | None, flags: dict[str, Any]) -> dict[str, Any]:
    """What every image shares: flags over the settings of the PNG that is made again."""
    return (made.model_dump(include=set(Sampling.model_fields)) if made else {}) | flags


def drawable(asked: Sequence[Asked], *, strict: bool) -> list[Sampling]:
    """The images to make. Raises the first mistake, if there is nothing else or with `strict`."""
    found = [one.sampling for one in asked if one.sampling is not None]
    mistakes = [one.mistake for one in asked if one.mistake is not None]
    if mistakes and (strict or not found):
        raise mistakes[0]
    return found


def inputs(jobs: Sequence[Sampling]) -> set[str]:
    """What is drawn from beside a prompt. Raises BadConfig where not all are alike: each takes another pipeline."""
    found = {frozenset(option for option, _ in job.pictures) for job in jobs}
    if len(found) > 1:
        raise BadConfig(
            "some of these are drawn from other kinds of pictures (image, mask, control); ask for them apart"
        )
    return set(found.pop()) if found else set()


def check_engine(engine: str | None, workers: int | None, devices: int | None, *, lasting: bool, single: Any) -> None:
    """Raises BadConfig for options that do not go together, BackendUnavailable without ray."""
    if engine is not None and engine not in ("local", "ray"):
        raise UnknownName("engine", engine, ("local", "ray"))
    if workers is not None and engine != "ray":
        raise BadConfig(f"--workers {workers} needs --engine ray")
    if engine == "ray" and (not lasting or (devices or 1) > 1 or any(option is not None for option in single)):
        raise BadConfig(
            "--engine ray draws a --prompt-file into a directory (-o DIR/), each picture on one device; leave "
            "--devices, --preview-every and --timeline out"
        )
    if lasting and single[1] is not None:
        raise BadConfig("--timeline is of one picture; leave it out of a job, or give one prompt")
    if engine == "ray" and find_spec("ray") is None:
        raise BackendUnavailable("--engine ray needs ray: pip install 'fastdiff[ray]'")


def listed(
    prompts: Sequence[str],
    prompt_file: Path | None,
    shared: dict[str, Any],
    seeds: Sequence[int],
    count: int,
    *,
    lasting: bool = False,
) -> list[Asked]:
    """Every image to make, prompt by prompt, seed by seed; each has a seed.

    Where none is given it is random, or with `lasting` comes from the prompt, so that it is the same the next time.
    """
    if not 1 <= count <= MAX_COUNT:
        raise BadConfig(f"-n {count}: give 1 to {MAX_COUNT} images a prompt")
    asked: list[tuple[str, dict[str, Any] | BadConfig]] = [("", {"prompt": prompt}) for prompt in prompts]
    if prompt_file is not None:
        asked += _read(prompt_file)
    if not asked and "prompt" in shared:
        asked = [("", {})]
    if not asked:
        nothing = f"{prompt_file} holds no prompt" if prompt_file else "nothing to draw"
        raise BadConfig(f"{nothing}; give a PROMPT, --prompt-file with at least one, or --from-image")
    chance, times = secrets.randbelow(2**32), Counter[str]()
    found: list[Asked] = []
    for where, values in asked:
        if isinstance(values, BadConfig):
            found.append(Asked(where, None, values))
            continue
        text = json.dumps(values, sort_keys=True)
        times[text] += 1
        usual = _seed_of(f"{times[text]} {text}") if lasting else chance
        starts = [values["seed"]] if values.get("seed") is not None else list(seeds) or [shared.get("seed", usual)]
        try:
            checked = [_sampling(where, shared | values | {"seed": start}) for start in starts]
            every = dict.fromkeys(job.seed + k for job in checked for k in range(count) if job.seed is not None)
            found += [Asked(where, _sampling(where, shared | values | {"seed": seed})) for seed in every]
        except BadConfig as mistake:
            found.append(Asked(where, None, mistake))
    return found


def _seed_of(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def _sampling(where: str, values: dict[str, Any]) -> Sampling:
    unknown = next((key for key in values if key not in Sampling.model_fields), None)
    if unknown is not None:
        raise BadConfig(f"{where}{UnknownName('key', unknown, Sampling.model_fields)}")
    try:
        return Sampling.model_validate(values)
    except ValidationError as error:
        raise BadConfig(f"{where}{sentence(error)}") from None


def _read(path: Path) -> list[tuple[str, dict[str, Any] | BadConfig]]:
    """Prompts of a file, or what is wrong with the line, each with the words that place it in an error message."""
    if path.is_char_device():  # /dev/zero has no end
        raise BadConfig(f"--prompt-file {path} is a device; give a file, a pipe or - for standard input")
    try:
        text = sys.stdin.read() if str(path) == "-" else path.read_text("utf-8-sig", "surrogateescape")
    except UnicodeDecodeError:
        raise BadConfig(f"--prompt-file {path} is not UTF-8 text") from None
    except OSError as error:
        raise BadConfig(f"--prompt-file {path} cannot be read: {error.strerror}") from None
    lines = [(n, line.strip()) for n, line in enumerate(text.split("\n"), 1) if line.strip()]  # not at U+2028
    is_json = path.suffix == ".jsonl" or (str(path) == "-" and bool(lines) and lines[0][1].startswith("{"))
    return [(where := f"{path} line {n}: ", _parse(where, line, is_json)) for n, line in lines]


def _parse(where: str, line: str, is_json: bool) -> dict[str, Any] | BadConfig:
    try:
        line.encode()  # bytes that are no UTF-8 were read as lone surrogates
        values = json.loads(line) if is_json else {"prompt": line}
    except UnicodeEncodeError:
        return BadConfig(f"{where}not UTF-8 text")
    except (ValueError, RecursionError) as error:
        return BadConfig(f"{where}not JSON: {getattr(error, 'msg', error)}")
    if isinstance(values, dict):
        values = {name: value for name, value in values.items() if value is not None}  # null is not given
    if not isinstance(values, dict) or "prompt" not in values:
        return BadConfig(f'{where}needs an object with a prompt, like {{"prompt": "a red circle", "seed": 1}}')
    return values


def targets(output: str, jobs: Sequence[Sampling]) -> list[Path]:
    """A path for each image, all different, where files can be written; a folder to make is made by `make_folder`."""
    path = Path(output).expanduser()
    if is_folder(output):
        names = [path / file_name(job) for job in jobs]
    elif path.suffix.lower() not in ALL:
        raise BadConfig(f"-o {output}: end the name in {', '.join(ALL)}, or in / for a directory")
    else:
        end = path.suffix
        names = [path if len(jobs) == 1 else path.with_name(f"{path.stem}_seed_{job.seed}{end}") for job in jobs]
    check_writable(path if path.is_dir() else path.parent)
    return list(_distinct(names))


def is_folder(output: str) -> bool:
    return output.endswith("/") or Path(output).expanduser().is_dir()


def file_name(job: Sampling) -> str:
    return f"{_slug(job.prompt)}_seed_{job.seed}.png"


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


def check_writable(folder: Path) -> None:
    if not folder.is_dir():
        raise FastdiffError(f"output directory {str(folder)!r} does not exist; create it first, or choose another -o")
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise FastdiffError(f"output directory {str(folder)!r} is not writable: {error.strerror}") from None
