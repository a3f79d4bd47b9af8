"""The repository's rooms, as the packaging tests see them."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HOMES = {  # directory in the tree -> directory in an installed copy
    "fastdiff": "fastdiff",
    "caching": "fastdiff/caching",
    "parallel": "fastdiff/parallel",
    "quant": "fastdiff/quant",
    "pipelines": "fastdiff/pipelines",
}
ROOMS = ("caching", "parallel", "quant")
FRONT_DOORS = ("bench", "cli", "demo", "images", "jobs", "media", "reading", "serve", "studio", "__main__")


def files(directory: str, pattern: str = "*") -> list[Path]:
    """Files under a top-level directory, relative to the root; links such as fastdiff/caching are not followed."""
    found: list[Path] = []
    folders = [ROOT / directory]
    while folders:
        for path in sorted(folders.pop().iterdir()):
            if path.is_symlink() or path.name == "__pycache__":
                continue
            if path.is_dir():
                folders.append(path)
            elif path.match(pattern):
                found.append(path.relative_to(ROOT))
    return sorted(found)


def installed_path(source: Path) -> str:
    """Where a file of a room lies in an installed copy."""
    return (Path(HOMES[source.parts[0]]) / Path(*source.parts[1:])).as_posix()


def module_name(source: Path) -> str:
    """The dotted name under which a file of a room is imported."""
    return installed_path(source).removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def layer(module: str) -> str:
    """Layer of a module of fastdiff: core, a room's name, pipelines or front."""
    head = [*module.split("."), ""][1]
    if head in (*ROOMS, "pipelines"):
        return head
    return "front" if head in FRONT_DOORS else "core"


def product() -> list[Path]:
    """Every Python file of the rooms."""
    return [path for directory in HOMES for path in files(directory, "*.py")]
