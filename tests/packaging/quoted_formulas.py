"""What pages calculate from benchmarks/*.json: phrases with # in the place of each number, and what it has to be.

Here too are numbers whose place no word around them tells, and those that were not measured by anything here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

from .tree import ROOT

Phrase = tuple[str, tuple[float, ...]]
SETTINGS = {
    "caching.md": {"0.3", "0.1", "0.03", "7.5"},
    "methods-and-papers.md": {"0.06", "0.12", "0.3", "0.5", "0.1", "0.03", "7.5", "30"},
    "mixed-precision.md": {"2.2"},
    "parallel.md": {"30"},
    "pruning.md": {"0.0001", "0.001", "0", "0.2"},
    "rivals.md": {"0.16", "0.3", "0.5"},
    "solvers.md": {"1.2"},
    "sparse-attention.md": {"0.25"},
}
MODELS = ("shapes-unet", "shapes-dit")


@cache
def read(file: str) -> Any:
    return json.loads((ROOT / f"benchmarks/{file}.json").read_text(encoding="utf-8"))


def row(file: str, **told: Any) -> dict[str, Any]:
    """The first row that has all of these."""
    rows = read(file) if isinstance(read(file), list) else read(file)["rows"]
    return next(row for row in rows if all(row.get(key) == value for key, value in told.items()))


def psnr(file: str, model: str, name: str) -> float:
    return float(row(file, model=model, name=name)["psnr"])


def readme() -> Iterator[Phrase]:
    links = read("parallel-overlap")["links"]
    for told, method, name in (
        ("`patch` (exact) | # | # | over 120 |", "patch", ""),
        ("`distrifusion` | # | #, hides # % of the wait | # |", "distrifusion", "distrifusion, warm-up 4"),
        ("`pcpp`, portion 0.3 | # | #, hides # % | # |", "pcpp", "pcpp p=0.3, warm-up 4"),
        ("`parastep`, order 2 | # | # | # |", "parastep", "parastep p=2 order 2, warm-up 4"),
    ):
        speed = [links[link][method]["one_device_over_step"] for link in ("unlimited", "1")]
        hides = [100 * links["1"][method]["hidden_share"]] if "hides" in told else []
        near = [row("parallel-quality", model="shapes-unet", ranks=2, name=name)["psnr"]] if name else []
        yield told, (*speed, *hides, *near)
    for told, name in (
        ("`w8a8`, ranges at each call | #, # | #, # | 1/# |", "w8a8 dynamic"),
        ("`w8a8`, calibrated | #, # | #, # | 1/# |", "w8a8 static"),
    ):
        pair = [row("quant-quality", model=model, name=name) for model in MODELS]
        yield told, (*(one[key] for one in pair for key in ("psnr", "prompt_accuracy")), pair[0]["ratio"])
    plain = [row("quant-quality", model=model, name="float")["prompt_accuracy"] for model in MODELS]
    yield "| float32 | identical, # | identical, # |", tuple(plain)


def caching() -> Iterator[Phrase]:
    for told, file, counts in (
        ("UNet, DDIM 20", "shapes-unet-20", (14, 12, 10, 8, 7)), ("UNet, DDIM 13", "shapes-unet-13", (10, 8, 6)),
        ("UNet, Euler 28", "shapes-unet-28-euler", (20, 15, 12, 10, 8)),
        ("UNet, DPM++ 2M 20", "shapes-unet-20-dpm++", (15, 13, 10, 8, 7)),
        ("UNet, UniPC 20", "shapes-unet-20-unipc", (15, 13, 10, 8)),
        ("DiT, FlowMatch 20", "shapes-dit-20", (13, 11, 9, 8, 7)), ("DiT, FlowMatch 13", "shapes-dit-13", (10, 8, 6)),
    ):  # fmt: skip
        for count in counts:
            plan, fewer = row(file, name=f"dp-{count}"), row(file, name=f"{count} steps")
            near = [one[key] for key in ("psnr", "psnr_converged") for one in (plan, fewer)]
            yield f"| {told} | {count} | #x | # | # | # | # |", (plan["speedup_denoising"], *near)
    probed = {one["name"]: one for one in read("predictors")["shapes-dit"]["dicache"]}
    first, second = probed["dicache 0.2, slope"], probed["dicache 0.4, slope"]
    yield "captions) # dB at # computed steps of 28", (first["psnr"]["mean"], first["computed_by_picture"])
    yield "At # computed it is #,", (second["computed_by_picture"], second["psnr"]["mean"])
    names = ("first_block", "dbcache", "teacache", "easycache", "seacache")
    work = [
        [row("batch-decisions", name=f"{name} {way}")["gigaoperations"] for way in ("strictest", "each")]
        for name in names
    ]
    yield "The strictest is up to # times the operations", (max(strict / each for strict, each in work),)


def language_models() -> Iterator[Phrase]:
    for case in ("block-causal, editing", "block-causal, no editing", "bidirectional, no editing"):
        one = row("fast_dllm", case=case)
        work = (one["work_ratio"], one["work_ratio_first_call"], one["cpu_seconds_ratio_median"])
        told = (*work, *one["cpu_seconds_ratio_range"], 100 * one["same_tokens"])
        yield f"| {case} | # | # | # (# to #) | # % |", told


def methods_and_papers() -> Iterator[Phrase]:
    reuse = next(one for one in read("predictors")["shapes-dit"]["dicache"] if one["name"] == "dicache 0.8, reuse")
    yield "and # by reuse #:", (reuse["computed_by_picture"], reuse["psnr"]["mean"])
    yield "on which `patch` waits # times its computing", (waits("1"),)
    yield "at as many bytes rank 4 is # dB farther", (codec("shapes-dit", "bits2") - codec("shapes-dit", "rank4"),)
    yield "one of two ranks at half speed: # to # times as fast as even shares", (min(shares()), max(shares()))
    large = read("quant-speed")["models"][0]["contenders"]
    dynamic = [psnr("quant-quality", model, "w8a8 dynamic") for model in MODELS]
    yield "at each call #, # dB; static", tuple(dynamic)
    for name in ("w8a16", "w4a16"):
        quality = [psnr("quant-quality", model, name) for model in MODELS]
        yield "| #, # dB; #x |", (*quality, large[name]["speedup"])
    gains = [psnr("quant-quality", m, "w4a16 normal grid") - psnr("quant-quality", m, "w4a16") for m in MODELS]
    yield "# above `w4a16` on the UNet, # below on the transformer", (gains[0], -gains[1])
    low_rank = row("quant-quality", model="shapes-unet", name="w4a16 low rank 8")["ratio"]
    yield "dB, 1/# of the bytes", (low_rank,)
    full, taught = (row("quant-distil", name=name) for name in ("float", "taught + w4a16"))
    pairs = [one[key] for key in ("denoiser_mb", "prompt_accuracy") for one in (taught, full)]
    yield "With distillation and 4 bits # of # MB, prompt accuracy # of #", tuple(pairs)
    pruned = [row("quant-prune", model=model, name="prune 0.0001 rank 0 + w8a16") for model in MODELS]
    yield "# and # % of the parameters gone", tuple(100 * one["parameters_removed"] for one in pruned)
    yield "built and measured: # to # dB by itself", fed_layers()
    halves = {one["name"]: one["psnr"] for one in read("cachequant-halves") if one["model"] == "shapes-unet"}
    gain = halves["w8a8, reuse: cached value"] - halves["w8a8, reuse: schedule"]
    yield "built and measured: # dB on the UNet", (gain,)
    yield "a line in the place of reuse brings # to # dB", lines()
    mixed, whole = (
        row("quant-mixed", model="shapes-dit", name=f"{name} int8") for name in ("mixed: bytes of", "uniform:")
    )
    yield "closed: # dB beside #", (mixed["psnr"], whole["psnr"])


def own_models() -> Iterator[Phrase]:
    times = [one["speedup"] for one in read("exact")["rows"] if one["row"].startswith(("text", "lossless"))]
    yield "(`benchmarks/exact.json`: # to # times)", (min(times), max(times))


def trials() -> Iterator[Phrase]:
    """What was tried beside the parallel methods, and is not built in."""
    for one in read("parallel-slabs")["rows"]:
        if "bytes_per_step" in one:
            ways = ("ring", "ulysses", "pipefusion", "slabs, overlap 0.5")
            sent = tuple(one["bytes_per_step"][way] / 1e6 for way in ways)
            yield f"| {one['name']} | {one['ranks']} | # | # | # | # |", sent
    rows = read("parallel-chords")["rows"]
    behind = []
    for one in rows:
        same = [o for o in rows if all(o[key] == one[key] for key in ("model", "ranks", "rounds"))]
        cores = [o["psnr"] for o in same if o["name"].startswith("chords")]
        if one["name"].startswith("parastep") and "order 2" not in one["name"] and cores:
            behind.append(one["psnr"] - max(cores))
    yield "it is # to # dB behind `order = 1`", (min(behind), max(behind))


def parallel() -> Iterator[Phrase]:
    yield from trials()
    held = (max(quarter) for quarter in zip(*read("soak-parallel")["rss_mb"], strict=True))
    yield "held # MB in its first quarter and # MB in its last", tuple(held)
    yield "a step is # times as fast as with even shares under `patch`, # under `ring`, # under `ulysses`", shares()
    for one in read("parallel-freshness")["rows"]:
        if "waiting_layers" in one:
            layers = f"| {one['waiting_layers']} of {one['all_layers']} | # of # | # |"
            kilobytes = (one["waiting_bytes"] / 1e3, one["all_bytes"] / 1e3)
            yield f"| `{one['model']}` | {one['name']} {layers}", (*kilobytes, one["psnr"])
    wait, alone = "parallel-freshness", "no layer waits"
    gains = [
        psnr(wait, "shapes-unet", f"{which} of the bytes") - psnr(wait, "shapes-unet", alone)
        for which in ("chosen, 10%", "first layers, 10%", "last layers, 10%", "chosen, 30%")
    ]
    yield "brings # dB where they are chosen, # spent on the first layers and # on the last", tuple(gains[:3])
    yield "30 % of them bring #", (gains[3],)
    one = psnr(wait, "shapes-dit", "chosen, 30% of the bytes") - psnr(wait, "shapes-dit", alone)
    yield "one, within 30 %, brings # dB", (one,)
    pcpp = row("parallel-quality", model="shapes-dit", ranks=4, name="pcpp p=0.3, warm-up 4")
    change = (pcpp["accuracy_change_points"], pcpp["accuracy_change_standard_error"])
    yield "on 4 ranks # ± #). Its synchronous", change
    ways = ("pcpp p=0.3 synchronous, warm-up 4", "pcpp p=0.3, warm-up 4")
    told = "staleness together (# and # dB), on the UNet staleness is the larger part (# and # dB)"
    yield told, tuple(psnr("parallel-quality", model, way) for model in MODELS[::-1] for way in ways)
    sent = {
        (model, name): row("parallel-quality", model=model, ranks=2, name=f"distrifusion{name}, warm-up 4")
        for model in MODELS for name in ("", " int8", " residual")
    }  # fmt: skip
    parts = [
        sent[model, name]["bytes_per_step_and_image"] / sent[model, ""]["bytes_per_step_and_image"]
        for model, name in (("shapes-unet", " int8"), ("shapes-unet", " residual"), ("shapes-dit", " int8"))
    ]
    yield "send # and # of the bytes of the UNet, # of those of the transformer", tuple(parts)
    yield from codecs()
    overlap = read("parallel-overlap")
    yield "what a step computes (# ms)", (1e3 * overlap["links"]["unlimited"]["distrifusion"]["computed_seconds"],)
    yield "it costs # times, a step is too short", (waits("2"),)
    yield "sends # of the keys and values", (overlap["claims"]["pcpp_share_of_keys_and_values"],)
    for method, name in (
        ("patch", None), ("distrifusion", "distrifusion, warm-up 4"), ("pcpp", "pcpp p=0.3, warm-up 4"),
        ("distrifusion int8", "distrifusion int8, warm-up 4"), ("parastep", "parastep p=2 order 2, warm-up 4"),
    ):  # fmt: skip
        links = [overlap["links"][link][method] for link in ("unlimited", "0.5", "1", "2")]
        cells = [number for link in links for number in (link["one_device_over_step"], 1e3 * link["waited_seconds"])]
        near = [row("parallel-quality", model="shapes-unet", ranks=2, name=name)["psnr"]] if name else []
        told = f"| {method} | # | {' | '.join(['#x, waits # ms'] * 4)} | {'#' if name else 'exact'} |"
        yield told, (links[0]["bytes"] / 1e3, *cells, *near)


def shares() -> tuple[float, ...]:
    return tuple(read("parallel-shares")[f"faster_{method}"] for method in ("patch", "ring", "ulysses"))


def codecs() -> Iterator[Phrase]:
    """Under `patch`: as fast as the bytes, and where those of `residual` take as long as computing."""
    faster = [codec(m, "residual", "bytes_per_step_and_image") / codec(m, "bits2", "bytes_per_step_and_image")
              for m in MODELS]  # fmt: skip
    yield "a run is then # times as fast (UNet) and # times (transformer)", tuple(faster)
    yield "take as long as computing, # and # times (calculated)", tuple(2 / (1 + 1 / times) for times in faster)
    four = [row("parallel-codecs-4", name=f"patch {name}") for name in ("residual", "bits2", "rank4", "rank8")]
    told = "sends # kB with `residual` and is at # dB, # kB at # with `residual2`, # kB at # with low rank 4, and #"
    sizes = ((one["bytes_per_step_and_image"] / 1e3, one["psnr"]) for one in four)
    yield f"{told} kB at #", tuple(number for pair in sizes for number in pair)
    dit = {name: codec("shapes-dit", name) for name in ("residual", "bits2", "rank4", "rank8")}
    told = "it is # dB farther, and at those of `residual` (rank 8) #"
    yield told, (dit["bits2"] - dit["rank4"], dit["residual"] - dit["rank8"])
    lost = codec("shapes-unet", "residual") - codec("shapes-unet", "rank4")
    yield "of the bytes of `residual` and loses # dB", (lost,)


def codec(model: str, name: str, what: str = "psnr") -> float:
    return float(row("parallel-codecs", model=model, name=f"patch {name}")[what])


def waits(link: str) -> float:
    return float(read("parallel-overlap")["claims"]["shares"][link]["exchange_over_computation"])


def pruning() -> Iterator[Phrase]:
    cost = {
        bits: sorted(
            psnr("quant-prune", m, bits) - psnr("quant-prune", m, f"prune 0.0001 rank 0 + {bits}") for m in MODELS
        )
        for bits in ("w8a16", "w4a16")
    }
    yield "costs # to # dB next to 8-bit weights and # to # dB next to 4-bit", (*cost["w8a16"], *cost["w4a16"])
    alike, taught = (row("quant-distil", name=name)["psnr"] for name in ("taught, all alike", "taught"))
    yield "learning with all weights: # dB less", (alike - taught,)


def quantization() -> Iterator[Phrase]:
    yield "A UNet of # GB of floats", (read("quant-loading")["float_mb"] / 1e3,)
    ranges = [psnr("quant-quality", "shapes-unet", name) for name in ("w8a8 static", "w8a8 static, mse")]
    yield "which measured # dB worse on `shapes-unet`", (ranges[0] - ranges[1],)
    clip = {(m, name): psnr("quant-clipping", m, f"w8a8 static{name}") for m in MODELS
            for name in ("", ", percentile 99.99", ", percentile 99.999", ", smooth percentile")}  # fmt: skip
    yield "| all that was seen | # | # |", tuple(clip[model, ""] for model in MODELS)
    unet, dit = ({name: clip[m, name] - clip[m, ""] for model, name in clip if model == m} for m in MODELS)
    yield "one value in 100,000 gains # dB", (dit[", percentile 99.999"],)
    yield "One in 10,000 loses # and # dB", (-unet[", percentile 99.99"], -dit[", percentile 99.99"])
    yield "on the UNet and loses # dB on the transformer", (-dit[", smooth percentile"],)
    clock = {model: read("quant-clock")["models"][model]["times_as_fast"] for model in MODELS}
    told = [clock[model]["w8a8, never slower"] for model in MODELS]
    yield "# (# to #) on `shapes-unet`, where 113 of 118 layers", tuple(told[0])
    yield "and # (# to #) on `shapes-dit`, where all 69", tuple(told[1])
    yield "the second between # and # dB by itself", fed_layers()
    yield "a straight line in the place of reuse # to #", lines()
    equal = [psnr("quant-mixed", "shapes-dit", name) for name in ("uniform: int8", "mixed: bytes of int8")]
    yield "it gains # dB at those of 8 bits", (equal[1] - equal[0],)
    floats = row("quant-memory", scheme="float32")["disk_mb"] - row("quant-memory", scheme="w8a16")["float_mb"]
    yield "layers that stay float (# MB)", (floats,)


def fed_layers() -> tuple[float, float]:
    """The least and the most that CacheQuant's second correction brings by itself."""
    rows = read("cachequant-halves")
    none = {(one["model"], one["name"]): one["psnr"] for one in rows if one["name"].endswith("schedule")}
    brings = [
        one["psnr"] - none[one["model"], one["name"].replace("fed layers", "schedule")]
        for one in rows if one["name"].endswith("fed layers")
    ]  # fmt: skip
    return min(brings), max(brings)


def lines() -> tuple[float, ...]:
    """What a line in the place of reuse brings, without a correction."""
    ways = ("w8a8, adams_bashforth: schedule", "w8a8, reuse: schedule")
    both = [[psnr("cachequant-halves", model, way) for way in ways] for model in MODELS[::-1]]
    return tuple(line - reuse for line, reuse in both)


def memory(model: str, told: str, text: str, *cards: int) -> Iterator[Phrase]:
    """In GB; text: the part that reads the prompt; cards: the sizes that are told of, the largest first."""
    found = row("memory-advice", model=model)
    parts = {name: size / 1e9 for name, size in found["weights"].items()}
    most = [found["cards_gb"][str(card)]["total"] / 1e9 for card in cards]
    decode = () if found["decode"] is None else (found["decode"] / 1e9,)
    first = (sum(parts.values()), *([parts[text]] if text else []), found["step"] / 1e9, *decode, most[0], 15)
    rest = [number for pair in zip(cards[1:], most[1:], strict=True) for number in pair]
    yield told, (*first, *rest)


SMALLER = "on a card of # GB # GB, with `--offload model` and the transformer in"
ALL = "# GB for a step, # GB in all with # % added, without the decode, which"
OWN = f"weights of # GB (# of them the text encoder's), {ALL}"


def sdxl() -> Iterator[Phrase]:
    told = "weights of # GB, # GB for a step, # GB for the decode, # GB in all with # % added"
    yield from memory("SDXL", told, "", 80)


def flux() -> Iterator[Phrase]:
    told = "weights of # GB (# of them T5's), # GB for a step, # GB for the decode, # GB in all with # % added; "
    rest = " `w8a16`; on one of # GB # GB with"
    yield from memory("FLUX.1 dev", told + SMALLER + rest, "text_encoder_2", 80, 24, 8)


def wan() -> Iterator[Phrase]:
    rest = " is not counted for videos; " + SMALLER + " `w8a16`; on one of # GB # GB with"
    yield from memory("Wan 2.1 14B", OWN + rest, "text_encoder", 80, 24, 8)


def qwen_image() -> Iterator[Phrase]:
    rest = " is not counted here; " + SMALLER + " `w4a16`; on one of # GB # GB with"
    yield from memory("Qwen-Image", OWN + rest, "text_encoder", 80, 24, 8)


def rivals() -> Iterator[Phrase]:
    def near(name: str) -> tuple[float, float]:
        found = row("shapes-dit-calibrators", name=name)
        return found["psnr"], found["psnr_converged"]

    for told, rule in (
        ("by threshold 0.16 | 12 to 13", "F1B0 0.16"), ("by threshold 0.3 | 8 to 9", "F1B0 0.3"),
        ("by threshold 0.5, as documented | 10", "F1B0 0.5 W8 MC6"), ("mask slow | 18", "SCM slow"),
        ("mask medium | 15", "SCM medium"), ("mask fast | 11", "SCM fast"), ("mask ultra | 8", "SCM ultra"),
        ("mask fast, dynamic | 11 to 12", "SCM fast dynamic"), ("mask ultra, dynamic | 11", "SCM ultra dynamic"),
    ):  # fmt: skip
        found = (near(f"DBCache {rule}{more}") for more in ("", " + TaylorSeer", " + DMD", " + FoCa"))
        yield f"| {told} | #, # | #, # | #, # | #, # |", tuple(value for pair in found for value in pair)
    for name in ("dp-16-stack", "dp-10", "fitted-10", "fitted-8"):
        yield f"`{name}` #, #", near(name)


def server() -> Iterator[Phrase]:
    found = read("serve")["servers"]
    ways = [found[way] for way in ("as they came", "in turns")]
    for kind in ("short", "edit", "long"):
        told = [way["latency_s"][kind][what] for way in ways for what in ("median", "p95")]
        yield f"| {kind} | # s, # s | # s, # s |", tuple(told)
    yield "In turns the p95 of short requests is # times smaller", (read("serve")["short_p95_ratio"],)
    first, last = ([way["memory_mb"][k] for way in ways] for k in (0, -1))
    yield "at the end | # MB, # MB | # MB, # MB |", (first[0], last[0], first[1], last[1])


def sparse_attention() -> Iterator[Phrase]:
    found = read("sparse-attention")
    choice = [
        one["choice_s"] / (one["choice_s"] + one["sparse_s"]) for one in found["speed"] if one["tokens"] >= 2048
    ]  # fmt: skip
    yield "at most # % of a call of 2048 tokens and more", (100 * max(choice),)
    near = {one["name"]: one["psnr"] for one in found["quality"]}
    gain = near["sparge, keep 0.5, 25 % of the steps dense"] - near["sparge, keep 0.5"]
    yield "dense ones there bring # dB", (gain,)


def troubleshooting() -> Iterator[Phrase]:
    seconds = {(one["task"], one["policy"], one["busy"]): one["seconds"][0] for one in read("busy")["medians"]}
    told = "OpenMP's own # and #, sleeping at once # and #, as the command line sets it # and #"
    ways = ("unset", "PASSIVE", "briefly")
    yield told, tuple(seconds["quantize", way, busy] for way in ways for busy in (0, 2))


PAGES: dict[str, Callable[[], Iterator[Phrase]]] = {
    "README.md": readme, "caching.md": caching, "language-models.md": language_models,
    "methods-and-papers.md": methods_and_papers, "own-models.md": own_models, "parallel.md": parallel,
    "pruning.md": pruning, "quantization.md": quantization, "sdxl.md": sdxl, "flux.md": flux, "wan.md": wan,
    "qwen-image.md": qwen_image, "rivals.md": rivals, "server.md": server,
    "sparse-attention.md": sparse_attention,
    "troubleshooting.md": troubleshooting,
}  # fmt: skip
