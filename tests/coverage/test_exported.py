"""Every pipeline that diffusers exports stands in docs/pipelines.md: with its denoisers, or with the reason.

To write the tables anew: python -c "from tests.coverage.test_exported import *; print(tables())"
"""

from __future__ import annotations

import inspect
import re
from functools import cache
from typing import Any

import diffusers
import pytest

from fastdiff.pipelines.families import KNOWN
from tests.coverage.test_denoisers import DENOISERS, UNTRIED, classes_of_the_zoo
from tests.ecosystem.test_pipelines import MODULAR
from tests.packaging.tree import ROOT

# Exported classes that draw with no denoiser of diffusers, and those that cannot be looked into without a library.
NONE = {
    "DiffusionPipeline": "the class that all others are made from",
    "ModularPipeline": "the class that modular pipelines are made from",
    "DiffusionGemmaPipeline": "a language model, which keeps what it read by itself",
    "LLaDA2Pipeline": "a language model: [language models](language-models.md)",
    "FluxPriorReduxPipeline": "turns pictures into embeddings, with no steps",
    "LTXLatentUpsamplePipeline": "enlarges latents, with no steps",
    "LTX2LatentUpsamplePipeline": "enlarges latents, with no steps",
    "LTX2VideoDiffusionDecodePipeline": "its steps are inside of a decoder, where no scheduler is seen",
    **dict.fromkeys(
        ("OnnxStableDiffusionImg2ImgPipeline", "OnnxStableDiffusionInpaintPipeline", "OnnxStableDiffusionPipeline",
         "OnnxStableDiffusionUpscalePipeline", "StableDiffusionOnnxPipeline"),
        "runs in ONNX, where there is no module to accelerate",
    ),
    **dict.fromkeys(
        ("AudioDiffusionPipeline", "SpectrogramDiffusionPipeline", "UniDiffuserPipeline", "WuerstchenCombinedPipeline",
         "WuerstchenDecoderPipeline", "WuerstchenPriorPipeline"),
        "deprecated by diffusers; not tried",
    ),
    **dict.fromkeys(
        ("DreamLitePipeline", "DreamLiteMobilePipeline"),
        "its UNet, a kind of UNet2DConditionModel, is tested in a loop of its own",
    ),
}  # fmt: skip
NEEDS = {  # exported as a stand-in here; what the class is annotated with where the library is
    **dict.fromkeys(("KolorsPipeline", "KolorsImg2ImgPipeline", "KolorsPAGPipeline"), "UNet2DConditionModel"),
    "ConsisIDPipeline": "ConsisIDTransformer3DModel",
}


pytestmark = pytest.mark.xdist_group("zoo")


@cache
def exported() -> dict[str, Any]:
    found = {name: getattr(diffusers, name) for name in dir(diffusers) if name.endswith("Pipeline")}
    return {name: kind for name, kind in found.items() if inspect.isclass(kind)}


def denoisers(name: str) -> list[str]:
    """Classes of denoisers that a pipeline is annotated with, or its blocks expect."""
    if name in NEEDS:
        return [NEEDS[name]]
    kind = exported()[name]
    if name.endswith("ModularPipeline") and name != "ModularPipeline":
        blocks = getattr(diffusers, kind.default_blocks_name)()
        hints = [getattr(part.type_hint, "__name__", "") for part in blocks.expected_components]
    else:
        hints = [str(part.annotation) for part in inspect.signature(kind.__init__).parameters.values()]
    return [known for known in KNOWN if any(re.search(rf"\b{known}\b", hint) for hint in hints)]


@cache
def tried() -> frozenset[str]:
    modular = {type(getattr(diffusers, case.blocks)().init_pipeline()).__name__ for case in MODULAR.values()}
    return frozenset(modular | {pipe for pipe, _ in classes_of_the_zoo()})


def tables() -> str:
    """By denoiser: pipelines that are tested themselves, and those that are tested through it; then those without."""
    rows = ["| denoiser | tested | tested through it |", "|---|---|---|"]
    for known in KNOWN:
        drawing = [name for name in exported() if known in denoisers(name)]
        how = "a loop of its own" if known in DENOISERS else "nothing"
        own = ", ".join(name.removesuffix("Pipeline") for name in drawing if name in tried()) or how
        others = ", ".join(name.removesuffix("Pipeline") for name in drawing if name not in tried())
        rows.append(f"| {known} | {own}{f': {UNTRIED[known]}' if known in UNTRIED else ''} | {others or '-'} |")
    rows += ["", "| pipeline | why it is not in the list |", "|---|---|"]
    return "\n".join([*rows, *(f"| {name} | {why} |" for name, why in NONE.items())])


def test_every_exported_pipeline_has_a_known_denoiser_or_a_reason():
    without = {name for name in exported() if not denoisers(name)}
    assert without == {name for name in NONE if name in exported()}


def test_what_is_tested_through_its_denoiser_is_tested():
    """A denoiser that nothing runs is named with the reason."""
    ran = {known for name in tried() for known in denoisers(name)} | {*DENOISERS}
    for name in exported():
        for known in denoisers(name):
            assert known in ran or known in UNTRIED, f"{name}: {known} runs in no test"


def test_the_docs_list_every_pipeline():
    page = (ROOT / "docs/pipelines.md").read_text(encoding="utf-8")
    listed = "\n".join(line for line in page.splitlines() if line.startswith("|"))
    assert listed == "\n".join(line for line in tables().splitlines() if line)


@pytest.mark.parametrize("name", NEEDS)
def test_stand_ins_are_stand_ins(name):
    kind = exported()[name]
    if not hasattr(kind, "_backends"):  # the library is here: the annotation must agree
        hints = " ".join(str(part.annotation) for part in inspect.signature(kind.__init__).parameters.values())
        assert NEEDS[name] in hints
