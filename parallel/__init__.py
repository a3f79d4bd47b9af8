"""Patch-parallel denoising across devices."""

from fastdiff.registry import Registry

METHODS = {
    "cfg": "fastdiff.parallel.cfg:CFG",
    "patch": "fastdiff.parallel.patch:Patch",
    "distrifusion": "fastdiff.parallel.distrifusion:DistriFusion",
    "pcpp": "fastdiff.parallel.pcpp:PCPP",
    "parastep": "fastdiff.parallel.parastep:ParaStep",
    "ulysses": "fastdiff.parallel.ulysses:Ulysses",
}
REGISTRY = Registry("parallel", METHODS)
