"""A short version of `scripts/load_serve.py`."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from .conftest import Server

SCRIPT = Path(__file__).parents[2] / "scripts" / "load_serve.py"


def test_many_clients(server: Server, monkeypatch) -> None:
    spec = importlib.util.spec_from_file_location("load_serve", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(script, "PRESETS", ("lossless", "cached"))
    bodies = [body | {"size": body["size"].replace("96x64", "64x32")} for body in script.menu()]
    monkeypatch.setattr(script, "menu", lambda: bodies)
    result = script.measure(server.url, os.getpid(), requests=80, clients=2)
    assert result["statuses"] == {"200": 76, "hung up": 4}
    assert (result["lost"], result["bytes_differ"], result["still_working"]) == (0, 0, True)
    assert set(result["burst_of_60"]) == {"200", "429"}
    assert sum(result["burst_of_60"].values()) == 60
    assert result["health"]["waiting"] == 0
