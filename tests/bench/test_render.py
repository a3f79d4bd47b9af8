"""The plot of a benchmark with many rivals."""

from fastdiff.bench import render
from tests.bench.test_verdict import row

PACKAGES = ("DeepCache", "cache-dit", "diffusers", "somebody-else")


def peer(name, package, speedup, psnr):
    return row(name, "peer", speedup, psnr).model_copy(update={"config": {"package": package}})


def test_many_points_are_told_apart_and_only_the_frontier_is_named():
    rows = [
        row("baseline", "baseline", 1.0, 120.0),
        row("mine", "fastdiff", 9.0, 60.0),
        row("gone", "peer", error="no"),
    ]
    rows += [peer(f"p{k}", PACKAGES[k % 4], 1 + k / 10, 30 + k % 7) for k in range(40)]
    rows += [row(f"{n} steps", "fewer_steps", 50 / n, 30.0) for n in (10, 20)]
    unipc = [row(f"{n} steps UniPC", "fewer_steps", 50 / n, 31.0) for n in (10, 20)]
    rows += [r.model_copy(update={"scheduler": "UniPCMultistepScheduler"}) for r in unipc]
    figure = render.pareto(rows)
    figure.canvas.draw()
    assert {text.get_text() for text in figure.axes[0].texts} == {"baseline", "mine"}
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["baseline", "fastdiff", *PACKAGES, "fewer steps", "fewer steps UniPC"]
    styles = render._styles(rows)
    assert len(set(styles.values())) == len(styles)


def test_few_points_are_all_named():
    rows = [
        row("baseline", "baseline", 1.0, 120.0),
        peer("slow", "DeepCache", 1.1, 20.0),
        row("mine", "fastdiff", 2, 60),
    ]
    figure = render.pareto(rows)
    assert {text.get_text() for text in figure.axes[0].texts} == {"baseline", "slow", "mine"}
