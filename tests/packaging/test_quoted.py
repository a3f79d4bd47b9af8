"""README and docs quote benchmarks/*.json digit by digit."""

from __future__ import annotations

import importlib
import re
from functools import cache
from pathlib import Path

import pytest

from .quoted import quotes, rounds_to
from .quoted_formulas import PAGES, SETTINGS, read
from .tree import ROOT

MADE = {"results.md", "compatibility.md"}  # whole pages that scripts write from the files
TEXTS = [ROOT / "README.md", *(page for page in sorted((ROOT / "docs").glob("*.md")) if page.name not in MADE)]
SLOT = r"([-+]?\d+(?:,\d{3})*(?:\.\d+)?)"


@cache
def printed() -> list[str]:
    """Lines of docs/parallel.md that scripts print from a file: `--table`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        quality, speed = map(importlib.import_module, ("measure_parallel", "predict_parallel"))
    tables = quality.markdown(read("parallel-quality")), speed.markdown(read("parallel-predictions")["rows"])
    return [line for table in tables for line in table.splitlines() if re.search(r"\d", line)]


def calculated(page: str, text: str) -> tuple[str, list[str]]:
    """The page without the numbers that a formula or a script gives, and what is wrong with these."""
    lines = set(printed()) if page == "parallel.md" else set()
    wrong = [f"{line!r} is not on the page" for line in lines - set(text.splitlines())]
    text = "\n".join(re.sub(r"\d", "", line) if line in lines else line for line in text.splitlines())
    for phrase, told in PAGES.get(page, lambda: iter(()))():
        parts = [r"\s+".join(map(re.escape, part.split(" "))) for part in phrase.split("#")]
        found = re.search(SLOT.join(parts), text)
        if found is None:
            wrong.append(f"{phrase!r} is not on the page any more")
            continue
        pairs = list(zip(found.groups(), told, strict=True))
        wrong += [f"{quoted} in {phrase!r} is {value:g}" for quoted, value in pairs if not rounds_to(value, quoted)]
        for start, end in reversed(found.regs[1:]):
            text = text[:start] + text[end:]
    return text, wrong


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.stem)
def test_every_quoted_number_is_in_its_file(page: Path) -> None:
    text, wrong = calculated(page.name, page.read_text(encoding="utf-8"))
    known = SETTINGS.get(page.name, set())
    missed = [quote for quote in quotes(text) if quote.text not in known and not quote.found()]
    wrong += [f"{quote.text} ({', '.join(sorted(quote.files))}): ...{quote.place}..." for quote in missed]
    assert not wrong, "\n".join(["not in the files that it is quoted from:", *wrong])


def test_a_wrong_last_digit_is_noticed() -> None:
    """Of nine in ten numbers, besides all that a formula or a script gives; the others have a namesake nearby."""
    seen = noticed = 0
    for page in TEXTS:
        text, _ = calculated(page.name, page.read_text(encoding="utf-8"))
        for quote in quotes(text):
            seen += 1
            noticed += not quote.found(quote.text[:-1] + str((int(quote.text[-1]) + 1) % 10))
    assert seen > 800 and noticed > 0.9 * seen, (noticed, seen)
