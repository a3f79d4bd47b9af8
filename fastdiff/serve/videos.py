"""Videos as jobs: one asks for a video, looks how far it is, fetches it, deletes it."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from fastapi import FastAPI, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from fastdiff import media
from fastdiff.images import Sampling
from fastdiff.studio import pictures

from .asked import Asked
from .bodies import DrawRequest
from .protocol import Problem
from .tickets import Ticket
from .uploads import documented, received

_KEPT = 32  # videos that are done; the oldest goes when there are more
_LIFE = 3600  # seconds that one is kept
_DELETED = Problem(499, "gone", "the video was deleted")
_TYPES = {".mp4": "video/mp4", ".webp": "image/webp", ".gif": "image/gif"}


class VideoRequest(DrawRequest):
    """A request for a video, as fields of a form."""

    model_config = ConfigDict(strict=False)  # a form has only text

    seconds: int | None = Field(None, ge=1, le=60, description="the nearest length that the model can make")
    frames: int | None = Field(None, ge=1, le=1000, description="instead of seconds")
    fps: float | None = Field(None, ge=1, le=240)


class Video(BaseModel):
    """A job, as OpenAI's API has it."""

    id: str
    object: Literal["video"] = "video"
    model: str
    prompt: str
    status: Literal["queued", "in_progress", "completed", "failed"]
    progress: int
    created_at: int
    completed_at: int | None
    expires_at: int | None
    size: str
    seconds: str
    seed: int
    error: dict[str, Any] | None


@dataclass
class Job:
    ticket: Ticket
    model: str
    usual: str  # size, where none was asked for
    fps: float
    id: str = field(default_factory=lambda: f"video_{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))
    ended: int | None = None

    def __post_init__(self) -> None:
        self.ticket.result.add_done_callback(lambda _: setattr(self, "ended", int(time.time())))

    @property
    def problem(self) -> Problem | None:
        result = self.ticket.result
        error = result.exception() if result.done() else None
        return error if isinstance(error, Problem) else None

    @property
    def made(self) -> dict[str, Any] | None:
        return self.ticket.result.result()[0] if self.ticket.result.done() and self.problem is None else None

    def shown(self) -> Video:
        ticket, made, problem = self.ticket, self.made, self.problem
        (asked,) = ticket.jobs
        status: Any = "failed" if problem else "completed" if made else "in_progress" if ticket.begun else "queued"
        clip = made and made["clip"]
        length = len(clip.frames) / clip.fps if clip else (asked.frames or 0) / self.fps
        return Video(
            id=self.id, model=self.model, prompt=asked.prompt, status=status,
            progress=100 if made else int(100 * ticket.done), created_at=self.created,
            completed_at=self.ended if made else None, expires_at=None if self.ended is None else self.ended + _LIFE,
            size=made["size"] if made else f"{asked.width}x{asked.height}" if asked.width else self.usual,
            seconds=f"{length:.3g}", seed=asked.seed or 0,
            error={"code": problem.code, "message": str(problem)} if problem else None,
        )  # fmt: skip


class Jobs:
    """Those of a server, newest last. What is done is kept for a while."""

    def __init__(self) -> None:
        self._all: dict[str, Job] = {}

    def add(self, job: Job) -> Job:
        self._all[job.id] = job
        return job

    def kept(self) -> list[Job]:
        done = [job for job in self._all.values() if job.ended is not None]
        for job in done[:-_KEPT] + [job for job in done[-_KEPT:] if (job.ended or 0) + _LIFE < time.time()]:
            del self._all[job.id]
        return list(self._all.values())

    def __getitem__(self, name: str) -> Job:
        found = next((job for job in self.kept() if job.id == name), None)
        if found is None:
            raise Problem(404, "not_found", f"there is no video {name!r}, or no longer", "video_id")
        return found

    def delete(self, name: str) -> None:
        self[name].ticket.stop(_DELETED)
        del self._all[name]


def frames(pipe: Any, body: VideoRequest) -> int | None:
    """The number of frames for a length: such as the VAE, which takes several at a time, can make."""
    if body.frames is not None or body.seconds is None:
        return body.frames
    step = getattr(pipe, "vae_scale_factor_temporal", 1)
    wanted = body.seconds * pictures.fps(pipe, Sampling(prompt=body.prompt, fps=body.fps))
    return round(wanted / step) * step + 1 if step > 1 else round(wanted)


def add_videos(app: FastAPI, asked: Asked, errors: Mapping[int | str, dict[str, Any]]) -> None:
    jobs, kind, answers = Jobs(), asked.within(VideoRequest), dict(errors)
    form = documented(kind, {"input_reference": False})

    @app.post("/v1/videos", response_model=Video, responses=answers, openapi_extra=form)
    async def create(request: Request) -> Video:
        """Ask for a video, of a text or of a picture that it begins with."""
        body, files = await received(request, kind, ("input_reference",))
        pipe = asked.desk.studio.pipe
        given = {"frames": frames(pipe, body), "fps": body.fps}
        ticket = await asked.submitted(body, files, given, preset=asked.preset(body), lasting=True)
        (job,) = ticket.jobs
        sides = pictures.usual_sides(pipe)
        usual = f"{sides[0]}x{sides[1]}" if sides else "auto"
        return jobs.add(Job(ticket, body.model or asked.names[0], usual, pictures.fps(pipe, job))).shown()

    @app.get("/v1/videos", responses=answers)
    async def listed(
        after: str | None = None, limit: int = 20, order: Literal["asc", "desc"] = "desc"
    ) -> dict[str, Any]:
        """The videos that are kept, newest first."""
        found = [job.shown() for job in (jobs.kept() if order == "asc" else reversed(jobs.kept()))]
        ids = [video.id for video in found]
        begin = ids.index(after) + 1 if after in ids else 0
        page = found[begin : begin + max(1, limit)]
        return {"object": "list", "data": page, "has_more": begin + len(page) < len(found)}

    @app.get("/v1/videos/{name}", response_model=Video, responses=answers)
    async def retrieve(name: str) -> Video:
        """How far it is."""
        return jobs[name].shown()

    @app.get("/v1/videos/{name}/content", responses=answers, response_class=Response)
    async def content(name: str, variant: Literal["video"] = "video") -> Response:
        """The file: MP4, or WebP where the server has no encoder for that."""
        job = jobs[name]
        if job.made is None:
            why = f"video {name!r} is not done ({job.shown().status}); ask for it when it is completed"
            raise Problem(409, "not_ready", why, "video_id")
        return Response(job.made["data"], media_type=_TYPES[media.suffix(job.made["clip"])])

    @app.delete("/v1/videos/{name}", responses=answers)
    async def delete(name: str) -> dict[str, Any]:
        """Delete it, also while it is made."""
        jobs.delete(name)
        return {"id": name, "deleted": True, "object": "video.deleted"}
