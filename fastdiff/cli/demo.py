"""`fastdiff demo`: a page in the browser."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

HOST = "127.0.0.1"


def demo(
    models: Annotated[
        list[str] | None, typer.Option("--model", "-m", help="Offer this model too, first; may be repeated.")
    ] = None,
    port: Annotated[int | None, typer.Option(help="Port on 127.0.0.1; the first free one from 7860 on.")] = None,
    bench: Annotated[
        Path, typer.Option("--bench", metavar="PATH", help="Benchmark to show: a JSON file, or a folder of them.")
    ] = Path("benchmarks"),
    browser: Annotated[bool, typer.Option("--browser", help="Open the page in the browser.")] = False,
    share: Annotated[
        bool, typer.Option("--share", help="Let anybody with the link in, through a server of Gradio's makers.")
    ] = False,
    auth: Annotated[str | None, typer.Option(metavar="USER:PASSWORD", help="Ask for a name and a password.")] = None,
) -> None:
    """Draw in the browser, the same picture with and without fastdiff."""
    from fastdiff.errors import BackendUnavailable, BadConfig, FastdiffError
    from fastdiff.studio.console import say, warn

    user, colon, password = (auth or "").partition(":")
    if auth is not None and not (user and colon and password):
        raise BadConfig("--auth takes user:password, for example --auth ada:secret")
    if port is not None and not 1 <= port <= 65535:
        raise BadConfig(f"--port {port}: give 1 to 65535")
    if find_spec("gradio") is None:
        raise BackendUnavailable("the demo needs gradio: pip install 'fastdiff[demo]'")
    if share and auth is None:
        warn("--share without --auth: whoever has or guesses the link can draw on this machine")
    say("starting")
    from fastdiff.demo.page import CSS, THEME, Page

    page = Page(models or [], bench, shared=share).blocks()
    page.queue(max_size=16)
    try:
        _, local, public = page.launch(
            server_name=HOST, server_port=port, share=share, auth=(user, password) if auth else None, inbrowser=browser,
            quiet=True, prevent_thread_lock=True, footer_links=[], ssr_mode=False, theme=THEME, css=CSS,
            run_history=False,
        )  # fmt: skip
    except OSError:
        raise FastdiffError(f"cannot listen on {HOST}:{port or '7860 and up'}: taken; choose another --port") from None
    typer.echo(local)
    if public:
        typer.echo(public)
    say("Ctrl-C ends it")
    try:
        page.block_thread()
    finally:
        page.close()
