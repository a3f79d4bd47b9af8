"""Wheels that travel with a checkout, for what a machine lacks. Needs nothing but Python."""

from __future__ import annotations

import re
import sys
import zipfile
from importlib import metadata
from pathlib import Path


def unpack(kit: Path, into: Path) -> list[str]:
    """Unpack the wheels of packages that are not here, or older here; the names of these.

    Ends the program with a sentence where such a wheel is for another Python.
    """
    found = []
    for wheel in sorted(kit.glob("*.whl")):
        name, version, *_, python, abi, _ = wheel.stem.split("-")
        if _here(name) >= _numbers(version):
            continue
        own = f"cp{sys.version_info.major}{sys.version_info.minor}"
        if python != own and abi != "abi3" and not python.endswith("py3"):
            asked = f"{sys.version_info.major}.{sys.version_info.minor}"
            sys.exit(f"{wheel.name} is not for Python {asked}; make gpu-kit KIT_PYTHON={asked} collects for it")
        zipfile.ZipFile(wheel).extractall(into)
        found.append(name)
    return found


def _here(name: str) -> tuple[int, ...]:
    try:
        return _numbers(metadata.version(name))
    except metadata.PackageNotFoundError:
        return ()


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version.partition("+")[0]))
