"""The state of a job, in its folder: a line of `manifest.jsonl` for each picture, and a lock on what is being drawn.

A lock is the operating system's (flock): it ends with the process that holds it, however that ends, so a claim whose
owner was killed is free at once. Whoever gets a claim looks again whether the picture is there before drawing it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, ValidationError

from fastdiff import output
from fastdiff.errors import FastdiffError
from fastdiff.images import Sampling, numbered
from fastdiff.media import SUFFIXES, read, usual
from fastdiff.studio.wanted import Asked, file_name, make_folder

CLAIMS = ".claims"


class Row(BaseModel):
    """One picture, or one line that asks for none that could be drawn. `where` is its place in the prompt file."""

    model_config = ConfigDict(extra="forbid")

    id: str
    status: Literal["pending", "done", "failed", "refused"]
    where: str
    prompt: str = ""
    seed: int | None = None
    file: str | None = None
    seconds: float | None = None
    error: str | None = None


@dataclass(frozen=True)
class Item:
    """A picture of a job; `id` is made from all that decides how it looks."""

    id: str
    where: str
    sampling: Sampling


def items_of(asked: Sequence[Asked], settings: Any) -> tuple[list[Item], list[Row]]:
    """The pictures of a list, each once, and a row for each mistake.

    `settings` is the model and all that is done to it, whatever it is made of.
    """
    items: dict[str, Item] = {}
    mistakes = []
    common = json.dumps(settings, sort_keys=True, default=str)
    for one in asked:
        where = one.where.rstrip(": ")
        if one.sampling is None:
            text = f"{one.mistake}"
            error = text.removeprefix(one.where).encode("utf-8", "backslashreplace").decode()
            mistakes.append(Row(id=_digest(text), status="refused", where=where, error=error))
        else:
            item = Item(_digest(one.sampling.model_dump_json() + common), where, one.sampling)
            items.setdefault(item.id, item)
    return list(items.values()), mistakes


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()[:16]


def _row(rows: Mapping[str, Row], item: Item) -> Row:
    drawn = item.sampling
    return rows.get(item.id) or Row(
        id=item.id, status="pending", where=item.where, prompt=drawn.prompt, seed=drawn.seed
    )  # fmt: skip


class Manifest:
    """One runner's view of a job. Raises FastdiffError where the folder cannot be written or the manifest not read.

    `again` draws what is done once more, in its place.
    """

    def __init__(self, folder: Path, items: Sequence[Item], mistakes: Sequence[Row], again: bool = False) -> None:
        self.folder, self.file = folder, folder / "manifest.jsonl"
        self.items, self.again = {item.id: item for item in items}, again
        self._claims = folder / CLAIMS
        self._open = deque(items)
        self._held: dict[str, FileLock] = {}
        self._version, self._known = (0, 0, 0), dict[str, Row]()
        make_folder(folder)
        make_folder(self._claims)
        self._lock = FileLock(self._claims / "manifest.lock")
        with self._changed() as rows:
            for row in [row for row in rows.values() if row.status == "refused"]:
                del rows[row.id]
            for item in items:
                row = _row(rows, item)
                rows[item.id] = row.model_copy(update={"where": item.where} | ({"status": "pending"} if again else {}))
            rows.update({row.id: row for row in mistakes})

    def claim(self) -> Item | None:
        """A picture that is missing and that nobody else draws now; None if there is none at the moment."""
        for _ in range(len(self._open)):
            item = self._open.popleft()
            if self._is_done(item):
                continue
            lock = FileLock(self._claims / f"{item.id}.lock")
            try:
                lock.acquire(blocking=False)
            except Timeout:
                self._open.append(item)
                continue
            self._held[item.id] = lock
            if not self._is_done(item) and not self._is_found(item):
                return item
            self._release(item)
        return None

    @property
    def open(self) -> int:
        """Pictures that this runner has not seen finished; those it has claimed are none of them."""
        return len(self._open)

    def settle(self, item: Item, **outcome: Any) -> None:
        """Write down what became of a claimed picture, and let go of it."""
        with self._changed() as rows:
            rows[item.id] = _row(rows, item).model_copy(update={"error": None} | outcome)
        self._release(item)

    def counts(self) -> Counter[str]:
        """How many of this runner's pictures have which status."""
        return Counter(row.status for row in self._rows().values() if row.id in self.items)

    def place(self, item: Item) -> tuple[Path, bool]:
        """Where a picture goes, and whether it may replace what is there: only what the job itself put there."""
        file = _row(self._rows(), item).file
        return (self.folder / file, True) if file else (self.folder / file_name(item.sampling), False)

    def _is_done(self, item: Item) -> bool:
        row = _row(self._rows(), item)
        return row.status == "done" and row.file is not None and (self.folder / row.file).is_file()

    def _is_found(self, item: Item) -> bool:
        found = None if self.again else self._orphan(item)
        if found is not None:
            with self._changed() as rows:
                done = {"status": "done", "file": found.name, "error": None}
                rows[item.id] = _row(rows, item).model_copy(update=done)
        return found is not None

    def _orphan(self, item: Item) -> Path | None:
        """The picture, if a runner was killed after it had saved it and before it could say so."""
        taken = {row.file for row in self._rows().values()}
        for suffix in map(usual, SUFFIXES):
            for path in numbered((self.folder / file_name(item.sampling)).with_suffix(suffix)):
                if not path.exists():
                    break
                with contextlib.suppress(FastdiffError):
                    if path.name not in taken and read(path).job == item.id:
                        return path
        return None

    def _release(self, item: Item) -> None:
        lock = self._held.pop(item.id)
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()

    @contextlib.contextmanager
    def _changed(self) -> Any:
        """The rows, for changing them: nobody else does meanwhile, and nobody sees half of it."""
        with self._lock:
            rows = self._rows()
            yield rows
            text = "".join(row.model_dump_json(exclude_none=True) + "\n" for row in rows.values())
            output.write(self.file, lambda part: part.write_text(text, encoding="utf-8"))

    def _rows(self) -> dict[str, Row]:
        """The manifest as it is on the disk; parsed only when somebody has written it since."""
        try:
            found = self.file.stat()
            version = (found.st_ino, found.st_mtime_ns, found.st_size)
            if version == self._version:
                return self._known
            lines = self.file.read_text(encoding="utf-8").split("\n")
            rows = [Row.model_validate_json(line) for line in lines if line]
        except FileNotFoundError:
            return {}
        except (ValidationError, UnicodeDecodeError):
            raise FastdiffError(
                f"{str(self.file)!r} is no manifest; move it away: pictures that are done are recognised without it"
            ) from None
        self._version, self._known = version, {row.id: row for row in rows}
        return self._known
