"""From a request to a ticket: what this model and server draw of it."""

from __future__ import annotations

import asyncio
import secrets
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import ValidationError

from fastdiff.errors import BadConfig, FastdiffError
from fastdiff.images import Sampling, sentence
from fastdiff.pipelines.outfit import lora_of

from .bodies import DrawRequest, ImageRequest, within
from .desk import Desk
from .protocol import Problem
from .tickets import Ticket
from .uploads import Files, keep
from .written import Form, preset_of

R = TypeVar("R", bound=DrawRequest)
_ELSEWHERE = {"picture": "makes pictures; ask /v1/images/generations", "video": "makes videos; ask /v1/videos"}


@dataclass(frozen=True)
class Asked:
    """Requests to a desk. `names` are those that the model has here, its own first."""

    desk: Desk
    names: Sequence[str]

    def within(self, kind: type[R]) -> type[R]:
        return within(self.desk.limits, list(self.desk.shelf), kind)

    def check_model(self, name: str | None) -> None:
        if name is not None and name not in self.names:
            known = " or ".join(map(repr, self.names))
            raise Problem(404, "model_not_found", f"this server has no model {name!r}, only {known}", "model")

    async def submitted(
        self, body: DrawRequest, files: Files | None = None, given: Mapping[str, Any] | None = None, **more: Any
    ) -> Ticket:
        """The ticket of a request, in the queue. Raises Problem for what this model or server does not draw."""
        folder = tempfile.TemporaryDirectory(prefix="fastdiff-") if files else None
        try:
            if files and folder:
                given = {**(given or {}), **await asyncio.to_thread(keep, files, folder)}
            ticket = Ticket(self._jobs(body, given or {}), loras=self._loras(body), folder=folder, **more)
            self.desk.submit(ticket)
        except BaseException:
            if folder:
                folder.cleanup()
            raise
        return ticket

    def preset(self, body: DrawRequest) -> str:
        wished = preset_of(body.quality, self.desk.shelf) if isinstance(body, ImageRequest) else None
        return body.preset or wished or next(iter(self.desk.shelf))

    def _jobs(self, body: DrawRequest, given: Mapping[str, Any]) -> list[Sampling]:
        self.check_model(body.model)
        most, studio = self.desk.limits.side, self.desk.studio
        made = "picture" if isinstance(body, ImageRequest) else "video"
        if studio.kind != made:
            raise Problem(400, "refused", f"{type(studio.pipe).__name__} {_ELSEWHERE[studio.kind]}")
        if max(body.sides.values(), default=0) > most:
            raise Problem(400, "too_large", f"size {body.size}: at most {most} pixels a side", "size")
        first = secrets.randbelow(2**32) if body.seed is None else body.seed
        same = body.model_dump(include={"prompt", "negative_prompt", "steps", "guidance_scale"}) | body.sides
        previews = 1 if isinstance(body, ImageRequest) and body.partial_images else None
        try:
            jobs = [Sampling(**(same | {"seed": first + k} | dict(given))) for k in range(getattr(body, "n", 1))]
            self.desk.able(frozenset(option for option, _ in jobs[0].pictures)).check(jobs, previews)
        except ValidationError as error:
            raise Problem(400, "refused", sentence(error)) from None
        except FastdiffError as error:
            raise Problem(400, "refused", str(error).replace("--", "")) from None  # which are options of a shell
        return jobs

    def _loras(self, body: DrawRequest) -> dict[str, str]:
        found: dict[str, str] = {}
        for text in body.lora:
            name, colon, scale = text.partition(":")
            if name not in self.desk.loras:
                known = " or ".join(self.desk.loras) or "none"
                raise Problem(400, "refused", f"lora = {name}: this server has {known}", "lora")
            file, own = lora_of(self.desk.loras[name])
            found[name] = f"{file}:{float(scale) if colon else own}"
        return found

    def image(self, body: ImageRequest) -> dict[str, Any]:
        """What a ticket for images has beside its jobs."""
        preset = self.preset(body)
        shown = {"previews": body.partial_images, "progress": body.progress} if body.stream else {}
        return {"preset": preset, "form": Form.of(body, preset), **shown}


def named(loras: Sequence[str]) -> dict[str, str]:
    """FILE[:scale] by the name that clients ask for it with: the file's, without folder and suffix."""
    found: dict[str, str] = {}
    for text in loras:
        name = lora_of(text)[0].stem
        if name in found:
            raise BadConfig(f"two LoRA are called {name!r}; rename one of the files")
        found[name] = text
    return found
