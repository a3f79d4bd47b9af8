"""Patch-parallel denoising across devices."""

from fastdiff.registry import Registry

METHODS = {
    "cfg": "fastdiff.parallel.methods.cfg:CFG",
    "patch": "fastdiff.parallel.methods.patch:Patch",
    "distrifusion": "fastdiff.parallel.methods.distrifusion:DistriFusion",
    "pcpp": "fastdiff.parallel.methods.pcpp:PCPP",
    "parastep": "fastdiff.parallel.methods.parastep:ParaStep",
    "ulysses": "fastdiff.parallel.methods.ulysses:Ulysses",
}
REGISTRY = Registry("parallel", METHODS)
