from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from fastdiff.cli import run
from tests.tiny import make


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    @property
    def files(self) -> list[str]:
        return self.out.split("\n")[:-1]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Directory of a tiny random Stable Diffusion."""
    path = tmp_path_factory.mktemp("models") / "tiny-sd"
    make("sd15").save_pretrained(path)
    return str(path)


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Result]:
    """Runs a command line in this process, in an empty directory."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def call(*arguments: object) -> Result:
        capsys.readouterr()
        code = run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return Result(code, captured.out, captured.err)

    return call
