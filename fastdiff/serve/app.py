"""The routes. Names in a request are looked up among those that the server was started with; none becomes a path."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

import fastdiff
from fastdiff.config import Layer
from fastdiff.pipelines.outfit import Outfit
from fastdiff.studio.drawing import Studio

from .asked import Asked
from .bodies import ImageRequest
from .desk import Desk
from .door import Door
from .meters import Meters
from .protocol import (
    ErrorReply,
    Health,
    ImagesReply,
    Limits,
    Model,
    ModelList,
    Problem,
)  # fmt: skip
from .tickets import Ticket
from .uploads import EditRequest, documented, received
from .videos import add_videos
from .written import usage

_PING = 15.0  # seconds of silence after which a stream says that it is alive
_ANSWERS: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorReply}, "5XX": {"model": ErrorReply}}
_HINTS = {"size": ": auto, or WIDTHxHEIGHT in pixels, such as 512x512"}
_DRAWS = ("/v1/images/generations", "/v1/images/edits")
_GONE = Problem(499, "gone", "the client went away")


@dataclass(frozen=True)
class Options:
    """What a server is started with; goes to every replica. `shelf` has the settings of each preset, default first."""

    model: str
    shelf: Mapping[str, Sequence[Layer]]
    dtype: str | None = None
    limits: Limits = field(default_factory=Limits)
    keys: Collection[bytes] = ()
    hosts: Sequence[str] = ("*",)  # what a browser may think this server is called
    aliases: Sequence[str] = ()  # other names that clients may have for the model
    loras: Mapping[str, str] = field(default_factory=dict)  # FILE[:scale] by the name that clients have for it


def build(options: Options) -> FastAPI:
    """Load the model and make the application; its queue is `app.state.desk`."""
    Outfit(tuple(options.loras.values())).check("cpu")
    studio = Studio(options.model, next(iter(options.shelf.values())), options.dtype)
    studio.only("picture", "video")
    studio.check([], None)
    meters = Meters()
    desk = Desk(studio, options.shelf, options.limits, meters, options.loras)
    asked = Asked(desk, [desk.studio.model.removeprefix("./"), *options.aliases])
    meters.watch(lambda: desk.waiting, lambda: desk.drawing)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with desk.open():
            yield

    bearer = [Depends(HTTPBearer(auto_error=False))] if options.keys else []
    app = FastAPI(
        title="fastdiff", version=fastdiff.__version__, lifespan=lifespan, docs_url=None, redoc_url=None,
        dependencies=bearer, redirect_slashes=False,
    )  # fmt: skip
    app.state.desk = desk
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(options.hosts), www_redirect=False)
    app.add_middleware(Door, keys=options.keys)
    _add_errors(app, meters)
    _add_images(app, asked)
    add_videos(app, asked, _ANSWERS)
    _add_state(app, asked, meters)
    return app


def _add_images(app: FastAPI, asked: Asked) -> None:
    answers = {200: {"content": {"text/event-stream": {}}}, **_ANSWERS}
    plain, edit = asked.within(ImageRequest), asked.within(EditRequest)

    @app.post("/v1/images/generations", responses=answers, response_model=ImagesReply)
    async def generations(body: plain, request: Request) -> Any:  # type: ignore[valid-type]
        """Draw images. With `stream`, the answer is a stream of events, the last of each image with the image."""
        asks: ImageRequest = body
        return await _answer(asked.desk, await asked.submitted(asks, **asked.image(asks)), request, asks.stream)

    form = documented(edit, {"image": True, "mask": False})

    @app.post("/v1/images/edits", responses=answers, response_model=ImagesReply, openapi_extra=form)
    async def edits(request: Request) -> Any:
        """Draw over an image, everywhere or where the mask is transparent; or from several, where the model can."""
        body, files = await received(request, edit, ("image", "mask"))
        if not files.get("image"):
            raise Problem(400, "invalid", "image: field required", "image")
        ticket = await asked.submitted(body, files, body.given, kind="image_edit", **asked.image(body))
        return await _answer(asked.desk, ticket, request, body.stream)


async def _answer(desk: Desk, ticket: Ticket, request: Request, stream: bool) -> Response:
    if stream:
        return StreamingResponse(_events(desk, ticket), media_type="text/event-stream")
    gone = asyncio.create_task(_until_gone(request, ticket))
    try:
        made = await ticket.result
    finally:
        gone.cancel()
    desk.meters.answers.labels(200).inc()
    said = {"created": int(time.time()), "data": made, "usage": usage([one.pop("tokens") for one in made])}
    return JSONResponse(said | ticket.form.about(made[0]["size"]))


async def _until_gone(request: Request, ticket: Ticket) -> None:
    """Stops the drawing when the client goes away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    ticket.stop(_GONE)


async def _events(desk: Desk, ticket: Ticket) -> AsyncIterator[str]:
    """Server-sent events; a client that goes away ends the generator, and that the drawing."""
    status = 499
    try:
        while True:
            try:
                event = await asyncio.wait_for(ticket.events.get(), _PING)
            except asyncio.TimeoutError:
                yield ": waiting\n\n"
                continue
            if event is None:
                break
            event["created_at"] = int(time.time())
            yield f"event: {event['type']}\ndata: {json.dumps(event)}\n\n"
        problem = ticket.result.exception()
        status = problem.status if isinstance(problem, Problem) else 200
        if isinstance(problem, Problem):
            yield f"event: error\ndata: {json.dumps(problem.body())}\n\n"
        yield "data: [DONE]\n\n"
    finally:
        ticket.stop(_GONE)
        desk.meters.answers.labels(status).inc()


def _add_state(app: FastAPI, asked: Asked, meters: Meters) -> None:
    desk, began = asked.desk, int(time.time())
    served = {name: Model(id=name, created=began) for name in asked.names}

    @app.get("/v1/models", response_model=ModelList, responses=_ANSWERS)
    async def models() -> ModelList:
        """The one model that is served, by each of its names."""
        return ModelList(data=list(served.values()))

    @app.get("/v1/models/{name:path}", response_model=Model, responses=_ANSWERS)
    async def model(name: str) -> Model:
        asked.check_model(name)
        return served[name]

    @app.get("/health", response_model=Health, responses={503: {"model": Health}})
    async def health() -> Response:
        """200 as long as requests are taken."""
        status = "closing" if desk.closing else "ok"
        state = Health(status=status, model=asked.names[0], drawing=desk.drawing, waiting=desk.waiting)
        return JSONResponse(state.model_dump(), 503 if desk.closing else 200)

    @app.get("/metrics", responses={200: {"content": {"text/plain": {}}}, **_ANSWERS}, response_class=Response)
    async def metrics() -> Response:
        return Response(meters.page(), media_type="text/plain; version=0.0.4")


def _add_errors(app: FastAPI, meters: Meters) -> None:
    """Every error has the shape that clients of OpenAI's API know."""

    def answer(request: Request, problem: Problem, headers: Mapping[str, str] | None = None) -> Response:
        if request.method == "POST" and request.url.path in _DRAWS:
            meters.answers.labels(problem.status).inc()
        retry = {"retry-after": "1"} if problem.status == 429 else {}
        return JSONResponse(problem.body(), problem.status, {**(headers or {}), **retry})

    @app.exception_handler(Problem)
    async def known(request: Request, problem: Problem) -> Response:
        return answer(request, problem)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        """The first mistake, with the name of the field and the value."""
        if isinstance(error.body, bytes):  # which nobody has tried to read as JSON
            kind = request.headers.get("content-type") or "not given"
            why = f"the content type is {kind}; send JSON, with the header Content-Type: application/json"
            return answer(request, Problem(415, "unsupported_media_type", why))
        found = error.errors()[0]
        if found["type"] == "json_invalid":
            why = f"the body is no JSON: {found['ctx']['error'].lower()} at character {found['loc'][1]}"
            return answer(request, Problem(400, "invalid", why))
        where = [str(part) for part in found["loc"][1:]]
        value = "" if found["type"] == "missing" else f" = {str(found.get('input'))[:60]}"
        said = f"{'.'.join(where) or 'the body'}{value}: {found['msg'][0].lower()}{found['msg'][1:]}"
        field = where[0] if where else None
        return answer(request, Problem(400, "invalid", said + _HINTS.get(field or "", ""), field))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        return answer(request, Problem(error.status_code, "http", str(error.detail)), error.headers)

    @app.exception_handler(Exception)
    async def unknown(request: Request, error: Exception) -> Response:
        return answer(request, Problem(500, "failed", "the server failed; its log says why"))
