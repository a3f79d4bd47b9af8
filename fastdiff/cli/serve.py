"""`fastdiff serve`: the image API of OpenAI over HTTP."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import Dtype, ModelName, Sets

if TYPE_CHECKING:
    from fastdiff.config import Layer

_LOCAL = ("127.0.0.1", "localhost", "::1")

Presets = Annotated[
    list[str] | None, typer.Option("--preset", help="A preset that clients may choose; repeatable, default first.")
]
Configs = Annotated[
    list[Path] | None, typer.Option("--config", help="A config file that clients may choose by its name; repeatable.")
]
Keys = Annotated[Path | None, typer.Option(help="Let only those in who have one of the keys in this file.")]
Loras = Annotated[
    list[str] | None,
    typer.Option("--lora", metavar="FILE[:SCALE]", help="A LoRA that clients may ask for by its name; repeatable."),
]
Aliases = Annotated[list[str] | None, typer.Option("--alias", help="Another name of the model; repeatable.")]
Engine = Annotated[str, typer.Option(help="local, or ray: replicas on a Ray cluster (extra: ray).")]


def serve(
    model: ModelName = "shapes-unet",
    preset: Presets = None,
    config: Configs = None,
    sets: Sets = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    api_key_file: Keys = None,
    max_images: Annotated[int, typer.Option(min=1, help="Images a request.")] = 4,
    max_side: Annotated[int, typer.Option(min=8, help="Pixels.")] = 2048,
    max_steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 200,
    alias: Aliases = None,
    lora: Loras = None,
    in_progress: Annotated[int, typer.Option(min=1, help="Requests drawn in turns; 1: in order of arrival.")] = 4,
    queue: Annotated[int, typer.Option(min=1, help="Requests that may wait; more are refused (429).")] = 16,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds a request may take, with waiting.")] = 300.0,
    grace: Annotated[float, typer.Option(min=0, help="Seconds to finish requests when the server stops.")] = 30.0,
    dtype: Dtype = None,
    engine: Engine = "local",
    replicas: Annotated[int, typer.Option(min=1, help="Copies of the model, with --engine ray.")] = 1,
) -> None:
    """Serve one model over HTTP, with the image API of OpenAI."""
    from fastdiff.errors import BadConfig, UnknownName
    from fastdiff.studio.console import say, warn

    if engine not in ("local", "ray"):
        raise UnknownName("engine", engine, ("local", "ray"))
    if engine == "local" and replicas > 1:
        raise BadConfig(f"--replicas {replicas} needs --engine ray")
    _require(engine)
    from fastdiff.serve import host as hosts
    from fastdiff.serve.app import Options
    from fastdiff.serve.asked import named
    from fastdiff.serve.door import read_keys
    from fastdiff.serve.protocol import Limits

    keys = read_keys(api_key_file) if api_key_file else frozenset()
    local = host in _LOCAL
    if not local and not keys:
        warn(f"anybody who reaches {host}:{port} can draw; ask for a key with --api-key-file")
    limits = Limits(
        images=max_images, side=max_side, steps=max_steps, queue=queue, timeout=timeout, grace=grace,
        in_progress=in_progress,
    )  # fmt: skip
    names = (*_LOCAL, "[::1]") if local else ("*",)
    options = Options(
        model, shelf(preset or [], config or [], sets or []), dtype, limits, keys, names, alias or (), named(lora or [])
    )

    out = sys.stdout

    def ready(address: str) -> None:
        print(address, flush=True, file=out)
        say(f"{model} on {address}/v1 with {', '.join(options.shelf)}; Ctrl-C stops")

    _log_to_stderr()
    if engine == "ray":
        hosts.serve_on_ray(options, host, port, replicas, ready)
    else:
        hosts.serve(options, host, port, ready)


def shelf(presets: list[str], configs: list[Path], sets: list[str]) -> dict[str, list[Layer]]:
    """The layers of each name that clients may ask for; of none, the preset `balanced`."""
    from fastdiff.errors import BadConfig
    from fastdiff.studio import settings

    found: dict[str, list[Layer]] = {}
    asked = [(name, name, None) for name in presets] + [(path.stem, None, path) for path in configs]
    for name, preset, config in asked or [("balanced", "balanced", None)]:
        if name in found:
            raise BadConfig(f"two settings are called {name!r}; rename one of the files")
        found[name] = settings.layers(preset, config, None, None, sets, None)
    return found


def _require(engine: str) -> None:
    from fastdiff.errors import BackendUnavailable

    for extra, packages in (
        ("serve", ("fastapi", "uvicorn", "prometheus_client", "python_multipart")),
        ("ray", ("ray",)),
    ):
        missing = [name for name in packages if find_spec(name) is None]
        if missing and extra in ("serve", engine):
            raise BackendUnavailable(f"serve needs {' and '.join(missing)}: pip install 'fastdiff[{extra}]'")


def _log_to_stderr() -> None:
    import logging

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
