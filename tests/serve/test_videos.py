"""Videos as jobs: asked for, looked at, fetched and deleted with OpenAI's client."""

from __future__ import annotations

from pathlib import Path

import openai
import pytest

from fastdiff.media import read, usual
from fastdiff.serve.app import Options
from tests.tiny import make

from .conftest import LIMITS, Server, serving, shelf, wait_for
from .test_edits import photo

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API")


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.mktemp("models") / "tiny-wan"
    make("wan").save_pretrained(path)
    presets = {"lossless": shelf(["lossless"], [], [])["lossless"]}
    with serving(Options(str(path), presets, limits=LIMITS, aliases=["sora-2"])) as found:
        yield found


@pytest.fixture(scope="module")
def client(videos: Server):
    with openai.OpenAI(base_url=f"{videos.url}/v1", api_key="unused", max_retries=0) as found:
        yield found


ASKED = {"prompt": "a red cat", "model": "sora-2", "size": "32x32", "extra_body": {"frames": 5, "steps": 2, "seed": 1}}


def test_a_video_from_asking_to_deleting(client: openai.OpenAI, tmp_path: Path) -> None:
    asked = client.videos.create(**ASKED)
    assert (asked.object, asked.model, asked.size, asked.prompt) == ("video", "sora-2", "32x32", "a red cat")
    assert asked.status in ("queued", "in_progress") and asked.progress < 100
    done = client.videos.poll(asked.id, poll_interval_ms=20)
    assert (done.status, done.progress, done.error, done.expires_at - done.completed_at) == (
        "completed",
        100,
        None,
        3600,
    )
    file = tmp_path / f"video{usual('video')}"
    client.videos.download_content(asked.id).write_to_file(file)
    made = read(file)
    assert (made.frames, made.seed, made.width, made.steps) == (5, 1, 32, 2)
    assert [video.id for video in client.videos.list()] == [asked.id]
    again = client.videos.create_and_poll(**ASKED, poll_interval_ms=20)
    assert client.videos.download_content(again.id).content == file.read_bytes()
    assert client.videos.delete(asked.id).deleted
    with pytest.raises(openai.NotFoundError, match="there is no video"):
        client.videos.retrieve(asked.id)


def test_seconds_are_frames_that_the_model_can_make(client: openai.OpenAI) -> None:
    """16 a second, four and one."""
    found = client.videos.create(prompt="a cat", seconds="4", size="32x32", extra_body={"steps": 1})
    client.videos.delete(found.id)
    assert found.seconds == f"{65 / 16:.3g}"


def test_one_that_is_made_can_be_deleted_and_is_not_ready(videos: Server, client: openai.OpenAI) -> None:
    long = client.videos.create(prompt="a cat", size="32x32", extra_body={"frames": 5, "steps": 400})
    wait_for(lambda: client.videos.retrieve(long.id).status == "in_progress")
    wait_for(lambda: client.videos.retrieve(long.id).progress > 0)
    with pytest.raises(openai.ConflictError, match="is not done"):
        client.videos.download_content(long.id)
    client.videos.delete(long.id)
    videos.idle()


def test_what_is_refused(videos: Server, server: Server, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="WanPipeline makes videos; ask /v1/videos"):
        client.images.generate(prompt="a cat")
    with pytest.raises(openai.BadRequestError, match="takes no image"):
        client.videos.create(prompt="a cat", input_reference=photo())
    with pytest.raises(openai.NotFoundError, match="no model 'sora-3', only 'tiny-wan' or 'sora-2'"):
        client.videos.create(prompt="a cat", model="sora-3")
    pictures = openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)
    with pictures, pytest.raises(openai.BadRequestError, match="makes pictures; ask /v1/images/generations"):
        pictures.videos.create(prompt="a cat")


def test_a_failure_is_told(videos: Server, client: openai.OpenAI) -> None:
    def fail(step: object) -> None:
        raise RuntimeError("/secret/path")

    clocks = videos.clocks()
    for clock in clocks:
        clock.on_call.append(fail)
    try:
        found = client.videos.create_and_poll(**ASKED, poll_interval_ms=20)
    finally:
        for clock in clocks:
            clock.on_call.remove(fail)
    assert (found.status, found.error.code) == ("failed", "failed")
    assert found.error.message == "drawing failed; the server's log says why"
