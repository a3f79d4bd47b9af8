"""fastdiff: make an existing diffusers pipeline faster with one config."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .version import __version__ as __version__

if TYPE_CHECKING:
    from . import caching, parallel, quant, registry
    from .config import Config as Config
    from .errors import FastdiffError as FastdiffError
    from .pipelines.accelerate import Accelerated as Accelerated
    from .pipelines.accelerate import accelerate as accelerate
    from .pipelines.accelerate import restore as restore
    from .pipelines.families import register_family as register_family
    from .pipelines.hosted import stream as stream
    from .pipelines.loading import load as load
    from .pipelines.quantize import quantize as quantize
    from .pipelines.quantized_files import save as save

    methods = registry.names
    register_cache = caching.REGISTRY.register
    register_parallel = parallel.REGISTRY.register
    register_quant = quant.REGISTRY.register

_HOME = {
    "Accelerated": "pipelines.accelerate:Accelerated",
    "Config": "config:Config",
    "FastdiffError": "errors:FastdiffError",
    "accelerate": "pipelines.accelerate:accelerate",
    "load": "pipelines.loading:load",
    "quantize": "pipelines.quantize:quantize",
    "save": "pipelines.quantized_files:save",
    "methods": "registry:names",
    "register_cache": "caching:REGISTRY.register",
    "register_family": "pipelines.families:register_family",
    "register_parallel": "parallel:REGISTRY.register",
    "register_quant": "quant:REGISTRY.register",
    "restore": "pipelines.accelerate:restore",
    "stream": "pipelines.hosted:stream",
}
__all__ = sorted(_HOME)


if not TYPE_CHECKING:  # else a type checker would take any name

    def __getattr__(name: str) -> Any:
        """Names are imported when first used, so that `import fastdiff` needs neither torch nor diffusers (PEP 562)."""
        if name not in _HOME:
            raise AttributeError(f"module 'fastdiff' has no attribute {name!r}")
        module, _, path = _HOME[name].partition(":")
        found: Any = importlib.import_module(f"fastdiff.{module}")
        for part in path.split("."):
            found = getattr(found, part)
        return found


def __dir__() -> list[str]:
    return __all__
