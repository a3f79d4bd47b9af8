"""Patch-parallel denoising across devices."""

from typing import Literal, TypeAlias

from fastdiff.registry import Registry

Codec: TypeAlias = Literal["raw", "int8", "residual", "residual2"]  # here: command lines know it before torch

METHODS = {
    "cfg": "fastdiff.parallel.methods.cfg:CFG",
    "patch": "fastdiff.parallel.methods.patch:Patch",
    "distrifusion": "fastdiff.parallel.methods.distrifusion:DistriFusion",
    "pcpp": "fastdiff.parallel.methods.pcpp:PCPP",
    "ring": "fastdiff.parallel.methods.ring:Ring",
    "token_ring": "fastdiff.parallel.methods.token_ring:TokenRing",
    "pipefusion": "fastdiff.parallel.methods.pipefusion:PipeFusion",
    "parastep": "fastdiff.parallel.methods.parastep:ParaStep",
    "ulysses": "fastdiff.parallel.methods.ulysses:Ulysses",
}
REGISTRY = Registry("parallel", METHODS)
