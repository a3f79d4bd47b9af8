"""Requests are drawn in turns: the shortest first, none waits for ever, each gets the picture that it gets alone."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest

from fastdiff.images import CHUNK
from fastdiff.serve.app import Options
from fastdiff.serve.turns import AGEING, Turns, urgency
from fastdiff.timing import Leash
from tests.core.test_outfit import adapted

from .conftest import CACHED, LIMITS, Server, serving, wait_for
from .test_desk import ask
from .test_edits import hole, opened, photo

Job = tuple[float, float]  # when it comes, what it takes


def ended(jobs: list[Job], key: Callable[[float, float, float], float]) -> list[float]:
    """When each is done, if the one with the lowest key of (left, waited, came) is worked on, a tenth of a second."""
    left, ends, now = [takes for _, takes in jobs], [0.0] * len(jobs), 0.0
    while any(left):
        there = [n for n, (came, _) in enumerate(jobs) if came <= now and left[n]]
        if there:
            chosen = min(there, key=lambda n: key(left[n], now - jobs[n][0], jobs[n][0]))
            left[chosen] = max(0.0, round(left[chosen] - 0.1, 3))
            ends[chosen] = now + 0.1
        now = round(now + 0.1, 3)
    return ends


@pytest.mark.parametrize("seed", range(5))
def test_all_are_done_sooner_on_average(seed: int) -> None:
    chosen = random.Random(seed)
    jobs = [(round(chosen.uniform(0, 20), 1), chosen.choice((0.4, 0.4, 5.0))) for _ in range(20)]
    fair = ended(jobs, lambda left, waited, _: urgency(left, waited))
    assert sum(fair) <= sum(ended(jobs, lambda left, waited, came: came))


def test_a_long_one_is_not_put_off_for_ever() -> None:
    """Twice as much comes as can be done, all of it shorter."""
    jobs = [(0.0, 2.0), *((0.5 * n, 1.0) for n in range(120))]

    def before(key: Callable[[float, float, float], float]) -> float:
        """When the last came that was done before the long one."""
        long, *ends = ended(jobs, key)
        return max(came for (came, _), end in zip(jobs[1:], ends, strict=True) if end < long)

    assert before(lambda left, waited, _: urgency(left, waited)) <= 2 / AGEING
    assert before(lambda left, waited, _: left) > 2 / AGEING


@dataclass(eq=False)
class Task:
    name: str
    left: float
    asked: float = 0.0
    alone: bool = False
    stopped: bool = False


@pytest.mark.parametrize(("places", "order"), [(2, "LssLLLLLLLLLMMMMMMMM"), (1, "LLLLLLLLLLMMMMMMMMss")])
def test_only_what_is_much_shorter_goes_before_what_has_begun(places: int, order: str) -> None:
    """Else those of one length would take all places."""
    seen: list[str] = []
    others = [Task("M", 8), Task("s", 2)]

    def work(task: Task, _: int) -> None:
        while task.left:
            seen.append(task.name)
            task.left -= 1
            while others:
                turns.add(others.pop(0))
            if task.left:
                turns.pause(task)

    turns: Turns[Task] = Turns(places, work, lambda task, place: False)
    turns.add(Task("L", 10))
    wait_for(lambda: len(seen) == 20)
    turns.close()
    assert "".join(seen) == order


@pytest.fixture
def steps(server: Server):
    """Which place took each step."""
    seen: list[int] = []
    heard = [lambda _, number=number: seen.append(number) for number in range(len(server.desk.places))]
    clocks = server.clocks()
    for clock, hear in zip(clocks, heard, strict=True):
        clock.on_tick.insert(0, hear)
    yield seen
    for clock, hear in zip(clocks, heard, strict=True):
        if hear in clock.on_tick:
            clock.on_tick.remove(hear)


def test_a_short_request_does_not_wait_for_a_long_one(server: Server, steps: list[int]) -> None:
    with ThreadPoolExecutor(2) as pool:
        long = pool.submit(server.draw, steps=30)
        wait_for(lambda: len(steps) > 3)
        assert server.draw(steps=4, seed=2)[0] == 200
        assert not long.done()
        assert long.result()[0] == 200
    begin = next(n for n, place in enumerate(steps) if place != steps[0])
    assert steps[begin : begin + 4] == [steps[begin]] * 4 and set(steps[begin + 4 :]) == {steps[0]}


MIX: list[dict[str, Any]] = [
    {"steps": 12}, {"steps": 6, "preset": "cached"}, {"steps": 3, "seed": 2}, {"steps": 4, "size": "32x64", "n": 2},
    {"steps": 8, "preset": "cached", "size": "48x64"}, {"steps": 2, "preset": "cached"},
]  # fmt: skip


def test_each_gets_the_picture_that_it_gets_alone(server: Server, steps: list[int]) -> None:
    """Whatever is drawn between its steps, with other presets and sizes, edited, or broken off."""

    def drawn(body: dict[str, Any]) -> list[str]:
        status, reply = server.draw(**body)
        assert status == 200, reply
        return [one["b64_json"] for one in reply["data"]]

    def edited(_: object) -> str:
        return server.edit({"image": photo(), "mask": hole()}, steps=6, preset="cached")[1]["data"][0]["b64_json"]

    alone, edit_alone = [drawn(body) for body in MIX], edited(None)
    server.idle()
    steps.clear()
    with ThreadPoolExecutor(8) as pool:
        server.desk.limits = LIMITS.model_copy(update={"queue": 20})
        links = [ask(server, steps=40, seed=n) for n in range(2)]
        wait_for(lambda: server.desk.drawing)
        one, others = pool.submit(edited, None), pool.map(drawn, MIX)
        links[0].close()
        assert (one.result(), list(others)) == (edit_alone, alone)
        links[1].close()
    server.idle()
    server.desk.limits = LIMITS


def test_one_that_is_parked_can_leave(server: Server, steps: list[int]) -> None:
    link = ask(server, steps=120)
    wait_for(lambda: len(steps) > 2)
    with ThreadPoolExecutor(1) as pool:
        short = pool.submit(server.draw, steps=8, seed=2)
        wait_for(lambda: len({*steps}) == 2)
        link.close()
        assert short.result()[0] == 200
    server.idle()
    assert server.draw()[0] == 200


def test_each_step_goes_by_the_leash(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a device would have all steps of a long request before the first of a short one is given to it."""
    went: list[str] = []
    monkeypatch.setattr(Leash, "step", lambda leash, device: went.append(device.type))
    assert server.draw(steps=3)[0] == 200
    assert went == ["cpu"] * 3


@pytest.fixture(scope="module")
def styled(model: str, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("lora")
    adapted(1).save_pretrained(folder)
    file = (folder / "adapter_model.safetensors").rename(folder / "style.safetensors")
    with serving(Options(model, {"cached": CACHED}, limits=LIMITS, loras={"style": f"{file}:0.5"})) as found:
        yield found


def test_a_lora_is_worn_for_the_request_that_asks_for_it(styled: Server) -> None:
    asked: list[dict[str, Any]] = [{}, {"lora": ["style"]}, {"lora": ["style:1"]}, {"lora": ["style:0.5"]}]
    alone = [styled.draw(steps=2, **body)[1]["data"][0]["b64_json"] for body in asked]
    assert alone[1] == alone[3] and len({*alone}) == 3
    assert json.loads(opened(alone[2]).info[CHUNK])["outfit"] == {"lora": ["style.safetensors:1.0"]}
    with ThreadPoolExecutor(4) as pool:
        styled.desk.limits = LIMITS.model_copy(update={"queue": 20})
        mixed = list(pool.map(lambda body: styled.draw(steps=2, **body)[1]["data"][0]["b64_json"], asked))
    assert mixed == alone
    status, reply = styled.draw(lora=["../style"])
    assert (status, reply["error"]["message"]) == (400, "lora = ../style: this server has style")
