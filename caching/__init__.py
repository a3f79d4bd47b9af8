"""Feature caching across timesteps: what is cached, when it is refreshed, how a skipped value is made."""

from fastdiff.registry import Registry

METHODS = {
    "a_sdm": "fastdiff.caching.methods.a_sdm:ASDM",
    "ab_cache": "fastdiff.caching.methods.ab_cache:ABCache",
    "apd": "fastdiff.caching.methods.apd:APD",
    "cachequant": "fastdiff.caching.methods.cachequant:CacheQuant",
    "dbcache": "fastdiff.caching.methods.dbcache:DBCache",
    "deepcache": "fastdiff.caching.methods.deepcache:DeepCache",
    "dicache": "fastdiff.caching.methods.dicache:DiCache",
    "dkv_cache": "fastdiff.caching.methods.dkv_cache:DKVCache",
    "dp": "fastdiff.caching.methods.dp:DP",
    "easycache": "fastdiff.caching.methods.easycache:EasyCache",
    "fast_dllm": "fastdiff.caching.methods.fast_dllm:FastDLLM",
    "faster_diffusion": "fastdiff.caching.methods.faster_diffusion:FasterDiffusion",
    "first_block": "fastdiff.caching.methods.first_block:FirstBlock",
    "fora": "fastdiff.caching.methods.fora:FORA",
    "joint": "fastdiff.caching.methods.joint:Joint",
    "magcache": "fastdiff.caching.methods.magcache:MagCache",
    "pab": "fastdiff.caching.methods.pab:PAB",
    "seacache": "fastdiff.caching.methods.seacache:SeaCache",
    "static": "fastdiff.caching.methods.static:Static",
    "switch": "fastdiff.caching.methods.switch:Switch",
    "taylorseer": "fastdiff.caching.methods.taylorseer:TaylorSeer",
    "teacache": "fastdiff.caching.methods.teacache:TeaCache",
    "tgate": "fastdiff.caching.methods.tgate:TGate",
}
REGISTRY = Registry("cache", METHODS)
