"""Post-training quantization of denoisers."""

from fastdiff.registry import Registry

METHODS: dict[str, str] = {}
REGISTRY = Registry("quant", METHODS)
