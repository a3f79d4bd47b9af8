"""The script that lets one machine stand for several."""

from __future__ import annotations

import pytest
import typer

from scripts import test_machines as machines

EPYC = "processor\t: 0\nflags\t\t: fpu sse4_2 avx avx2 fma\nbugs\t\t: none\n\nprocessor\t: 1\nflags\t\t: fpu\n"


def test_a_row_runs_where_the_processor_has_what_it_needs(monkeypatch, tmp_path, capsys) -> None:
    """The others are named with what is lacking; a row that failed makes the whole fail."""
    (tmp_path / "cpuinfo").write_text(EPYC)
    ran = []

    def run(row: machines.Row, tests: list[str], log: object) -> tuple[int, str]:
        ran.append((row, tests))
        return row.threads - 1, f"FAILED tests/a.py::b\n{row.threads} failed, 3 passed, 2 deselected in 1.0s (0:01)\n"

    monkeypatch.setattr(machines, "CPU", tmp_path / "cpuinfo")
    monkeypatch.setattr(machines, "run", run)
    with pytest.raises(typer.Exit) as end:
        machines.main(["tests/a.py"], None, tmp_path)
    said = capsys.readouterr().out
    names = ("one-thread", "two-threads", "default", "avx2", "onednn-avx2")
    assert [row for row, _ in ran] == [machines.ROWS[name] for name in names]
    assert end.value.exit_code == 1 and ran[0][1] == ["tests/a.py"]
    assert "avx512         not on this processor, which lacks avx512f" in said
    assert "two-threads    3 passed, 2 failed, 0 s, exit 1\n  FAILED tests/a.py::b\n" in said
    assert len([line for line in said.splitlines() if not line.startswith(" ")]) == len(machines.ROWS)


def test_rows_are_selected_by_name(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setattr(machines, "run", lambda *_: (0, "no tests ran\n"))
    with pytest.raises(typer.Exit) as end:
        machines.main(None, ["default"], tmp_path)
    assert (end.value.exit_code, capsys.readouterr().out) == (0, "default        broke off, 0 s\n")
    with pytest.raises(typer.BadParameter, match="no row sse; rows are one-thread, "):
        machines.main(None, ["sse"], tmp_path)


def test_torch_has_the_threads_that_pytest_was_told(request) -> None:
    import torch

    assert torch.get_num_threads() == request.config.getoption("--threads")
