"""A short version of `scripts/load_serve.py`."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

from .conftest import Server

SCRIPT = Path(__file__).parents[2] / "scripts" / "load_serve.py"


def test_many_clients(server: Server, monkeypatch) -> None:
    spec = importlib.util.spec_from_file_location("load_serve", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, script)  # where dataclasses look for what their fields are
    spec.loader.exec_module(script)
    monkeypatch.setattr(script, "PRESETS", ("lossless", "cached"))
    monkeypatch.setattr(script, "SIZES", ("auto", "64x64", "48x64", "64x32"))
    bodies = [(kind, body | ({"steps": 5} if kind in ("long", "edit") else {})) for kind, body in script.menu()[:24]]
    assert {kind for kind, _ in bodies} == {"short", "long", "edit", "cancel"}
    gone = sum(kind == "cancel" for kind, _ in bodies)
    monkeypatch.setattr(script, "menu", lambda: bodies)
    result = script.measure({"in turns": (server.url, os.getpid())}, requests=24, clients=2, rounds=2)
    told = result["servers"]["in turns"]
    assert told["statuses"] == {"200": 24 - gone, "hung up": gone}
    assert (told["lost"], told["bytes_differ"], result["still_working"]) == (0, 0, True)
    assert set(result["burst_of_60"]) == {"200", "429"}
    assert sum(result["burst_of_60"].values()) == 60
    assert told["health"]["waiting"] == 0
