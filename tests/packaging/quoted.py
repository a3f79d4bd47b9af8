"""The numbers that README and docs quote from benchmarks/*.json, what stands around them, and whether they are there.

A paragraph that names files is about them, and so is what follows up to the next heading or the next name. A number in
it has to be the rounding of one in these files. Large files hold nearly every number of two digits, so it is not looked
for in all of a file: only in the places whose names (of the row, the model, the method) share most words with what
stands around it. Numbers of four digits and more are rare enough to be looked for everywhere.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from statistics import median
from typing import Any

from .tree import ROOT

FILE = re.compile(r"benchmarks/([\w.+{},*-]+)\.json")
MADE = re.compile(r"^```.*?^```|<!-- (\w+):start -->.*?<!-- \1:end -->|\]\((?!\.\./benchmarks)[^)]*\)", re.M | re.S)
NUMBER = re.compile(
    r"(?<![\w.,^-])[-+]?(?:\d+(?:,\d{3})*\.\d+|\d+(?:,\d{3})*(?= (?:ms|MB|kB|GB|dB)(?!\w|/)| %))(?!\.?\d)"
)
# Names of rows and settings, what the papers measured, numbers of papers.
FOREIGN = re.compile(r"`[^`]*`|Theirs.*|\b\d{4}\.\d{5}\b|Another project's.*")
SCALES = {"%": 100, "ms": 1e3, "kB": 1e-3, "MB": 1e-6, "GB": 1e-9}
LETTERS = {"U": "shapes-unet", "D": "shapes-dit"}  # how docs/methods-and-papers.md calls them
# What is no result and names no row.
BESIDE = {
    "command", "environment", "versions", "packages", "config", "remark", "what", "notes", "note", "plan", "compute",
    "seeds", "machine", "source", "device",
}  # fmt: skip
STOP = {*"asx", "the", "of", "in", "and", "to", "is", "with", "at", "by", "for", "db", "on", "it", "as", "e"}
ALIAS = {"u": "unet", "d": "dit", "transformer": "dit"}
PROSE = 80  # characters; a longer cell of a table is read as prose
LONG = 4  # digits


@dataclass(frozen=True)
class Quote:
    """A number of a page, the files that it should be in, the words around it, and by how many words less than the
    best place shares with these another may be it, too."""

    text: str
    files: frozenset[str]
    around: frozenset[str]
    unit: str
    slack: int
    place: str

    def found(self, text: str = "") -> bool:
        """Whether the number (or another text in its place) is where it should be."""
        text = text or self.text
        scales = [1, *(scale for unit, scale in SCALES.items() if unit in self.unit)]
        # Of names that share as many words the shortest is the row's own: "w8a8 static" before "w8a8 static, split".
        pool = [
            (len(label & self.around) - (len(label - self.around) / 1000 if not self.slack else 0), value)
            for file in self.files for value, label in values(file)
        ]  # fmt: skip
        # A whole number that is told with decimals is a setting that happens to be as large, but for bytes and parts.
        shared = [
            count for count, value in pool for scale in scales
            if (scale != 1 or type(value) is float or "." not in text) and rounds_to(value * scale, text)
        ]  # fmt: skip
        long = len(re.sub(r"\D", "", text).lstrip("0")) >= LONG
        return bool(shared) and (long or max(shared) >= max(count for count, _ in pool) - self.slack)


def rounds_to(value: float, text: str) -> bool:
    """Whether the text, which may leave out the sign, is the value to as many digits as it shows."""
    digits = len(text.partition(".")[2])
    value = value if text[0] in "+-" else abs(value)
    return abs(value - float(text.replace(",", ""))) <= 0.5 * 10**-digits + 1e-9


def words(text: str) -> frozenset[str]:
    found = re.findall(r"[a-z0-9]+(?:[.+][0-9+]+)*", text.lower())
    return frozenset(ALIAS.get(word, word) for word in found if word not in STOP)


@cache
def values(file: str) -> list[tuple[float, frozenset[str]]]:
    """The numbers of a file, each with the words of what names it: the file, and all names, texts and whole numbers
    that stand beside it and above. Of a list of numbers the median, too, and of a long one only that."""
    found: list[tuple[float, frozenset[str]]] = []

    def walk(node: Any, label: frozenset[str]) -> None:
        if isinstance(node, dict):
            told = {key: value for key, value in node.items() if key not in BESIDE}
            own = label.union(*(words(str(value)) for value in told.values() if type(value) in (str, int)))
            for key, value in told.items():
                walk(value, own | words(key.replace("_", " ")) if holds_names(value) else own)
        elif isinstance(node, list):
            numbers = [value for value in node if isinstance(value, (int, float))]
            found.extend([(median(numbers), label)] if len(numbers) > 2 else [])
            for value in node if len(node) < 25 or not numbers else []:
                walk(value, label)
        elif type(node) in (int, float):
            found.append((node, label))

    walk(json.loads((ROOT / f"benchmarks/{file}.json").read_text(encoding="utf-8")), words(file.replace("-", " ")))
    return found


def holds_names(node: Any) -> bool:
    """Whether the key of this names what is in it: a spread is a number of its row."""
    return isinstance(node, dict) or (isinstance(node, list) and bool(node) and isinstance(node[0], dict))


def named(text: str) -> frozenset[str]:
    """Files of benchmarks/ by their names or patterns. A verdict repeats rows of its benchmark."""
    found = set()
    for name in FILE.findall(text):
        parts = re.fullmatch(r"(.*)\{(.*)\}(.*)", name)
        patterns = [parts[1] + choice + parts[3] for choice in parts[2].split(",")] if parts else [name]
        found |= {path.stem for pattern in patterns for path in (ROOT / "benchmarks").glob(f"{pattern}.json")}
    return frozenset(name for name in found if not name.endswith("-verdict"))


def quotes(page: str) -> Iterator[Quote]:
    """All numbers of a page that are about files, without those of code, of papers and of parts that are made."""
    files: frozenset[str] = frozenset()
    before = ""
    for block in re.split(r"\n\s*\n|\n(?=- |\d+\. |#)", MADE.sub("]", page)):
        if block.lstrip().startswith("|"):
            yield from of_table(block.strip(), files, before)
            continue
        files = frozenset() if block.startswith("#") else named(block) or files
        before = block
        yield from of_text(block, files, "", "")


def of_text(text: str, files: frozenset[str], around: str, unit: str) -> Iterator[Quote]:
    for number in NUMBER.finditer(FOREIGN.sub(lambda found: " " * len(found[0]), text)) if files else ():
        near = text[max(0, number.start() - 160) : number.end() + 80]
        unit_ = unit + text[number.end() : number.end() + 4]
        yield Quote(number[0], files, words(f"{around} {near}"), unit_, 1, " ".join(near.split()))


def of_table(text: str, files: frozenset[str], before: str) -> Iterator[Quote]:
    """Cells belong to their row, by its cells without numbers, and to the head of their column; a short line before the
    table names it, a paragraph may have told the unit."""
    units = " ".join(re.findall(rf"\b(?:{'|'.join(SCALES)})(?!\w)", before))
    before = before if len(before) < PROSE / 2 else ""
    head, _, *rows = ([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in text.splitlines())
    for cells in rows:
        row = " ".join(cells)
        letters = frozenset(LETTERS[letter] for letter in re.findall(r"\b[UD]\b", row))
        about = (files or letters) | named(row)
        names = " ".join(cell for cell in cells[1:] if not NUMBER.search(cell) and len(cell) < PROSE)
        for title, cell in list(zip(head, cells, strict=True))[1:]:
            if title == "the paper has":
                continue
            if len(cell) > PROSE:
                yield from of_text(cell, about, f"{title} {cells[0]}", title)
                continue
            own = re.sub(r"[\d.,]+", " ", cell)
            for quote in of_text(cell, about, "", f"{title} {units}"):
                around = words(f"{before} {title} {cells[0]} {names} {own}")
                yield Quote(quote.text, about, around, quote.unit, 0, f"{cells[0]} | {cell}")
