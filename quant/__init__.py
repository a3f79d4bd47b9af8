"""Post-training quantization of denoisers."""

from fastdiff.registry import Registry

METHODS = {
    "w8a16": "fastdiff.quant.schemes.w8a16:W8A16",
    "w8a8": "fastdiff.quant.schemes.w8a8:W8A8",
    "w4a16": "fastdiff.quant.schemes.w4a16:W4A16",
    "w4a8": "fastdiff.quant.schemes.w4a8:W4A8",
    "fp8": "fastdiff.quant.schemes.fp8:FP8",
    "mixed": "fastdiff.quant.schemes.mixed:Mixed",
}
REGISTRY = Registry("quant", METHODS)
