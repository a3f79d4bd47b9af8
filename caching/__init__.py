"""Feature caching across timesteps: what is cached, when it is refreshed, how a skipped value is made."""

from fastdiff.registry import Registry

METHODS = {
    "a_sdm": "fastdiff.caching.a_sdm:ASDM",
    "ab_cache": "fastdiff.caching.ab_cache:ABCache",
    "cachequant": "fastdiff.caching.cachequant:CacheQuant",
    "dbcache": "fastdiff.caching.dbcache:DBCache",
    "deepcache": "fastdiff.caching.deepcache:DeepCache",
    "dp": "fastdiff.caching.dp:DP",
    "easycache": "fastdiff.caching.easycache:EasyCache",
    "fast_dllm": "fastdiff.caching.fast_dllm:FastDLLM",
    "faster_diffusion": "fastdiff.caching.faster_diffusion:FasterDiffusion",
    "first_block": "fastdiff.caching.first_block:FirstBlock",
    "fora": "fastdiff.caching.fora:FORA",
    "magcache": "fastdiff.caching.magcache:MagCache",
    "pab": "fastdiff.caching.pab:PAB",
    "seacache": "fastdiff.caching.seacache:SeaCache",
    "static": "fastdiff.caching.static:Static",
    "taylorseer": "fastdiff.caching.taylorseer:TaylorSeer",
    "teacache": "fastdiff.caching.teacache:TeaCache",
    "tgate": "fastdiff.caching.tgate:TGate",
}
REFUSED = {
    "dkv_cache": "dkv_cache fits no pipeline of diffusers: the open tokens of a LLaDA2 block change the keys and "
    "values of its finished ones, and the pipeline reads and edits all of them at every step. Use fast_dllm; the "
    "reasons are in docs/language-models.md"
}
REGISTRY = Registry("cache", METHODS, REFUSED)
