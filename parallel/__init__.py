"""Patch-parallel denoising across devices."""

from fastdiff.registry import Registry

METHODS: dict[str, str] = {}
REGISTRY = Registry("parallel", METHODS)
