"""Feature caching across timesteps: what is cached, when it is refreshed, how a skipped value is made."""

from fastdiff.registry import Registry

METHODS = {
    "ab_cache": "fastdiff.caching.ab_cache:ABCache",
    "deepcache": "fastdiff.caching.deepcache:DeepCache",
    "dp": "fastdiff.caching.dp:DP",
    "first_block": "fastdiff.caching.first_block:FirstBlock",
    "static": "fastdiff.caching.static:Static",
}
REGISTRY = Registry("cache", METHODS)
