"""`methods` and `env`."""

from __future__ import annotations

import json
import platform
from typing import Any

from fastdiff import __version__, threads
from fastdiff.machine import cpu_name, package_version
from fastdiff.registry import names, registry
from fastdiff.studio.console import print_table

NEEDED = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "pydantic", "pillow")
OPTIONAL = (
    "xformers", "torchao", "triton", "gradio", "fastapi", "uvicorn", "matplotlib", "torchmetrics", "ray", "peft",
    "gguf", "imageio-ffmpeg", "DeepCache", "cache-dit", "tgate", "tomesd",
)  # fmt: skip


def methods(as_json: bool) -> None:
    if as_json:
        print(json.dumps(names()))
        return
    rows = [
        (kind, name, (registry(kind)[name].__doc__ or "").strip().split("\n")[0])
        for kind, known in names().items()
        for name in known
    ]
    rows += [(kind, "none yet", "") for kind, known in names().items() if not known]
    print_table(rows, "kind", "method", "what it does")


def env(as_json: bool) -> None:
    found = facts()
    if as_json:
        print(json.dumps(found))
        return
    rows = []
    for name, value in found.items():
        if isinstance(value, dict):
            rows += [(f"  {key}", str(item)) for key, item in value.items() if item is not None]
            if missing := [key for key, item in value.items() if item is None]:
                rows.append(("  not installed", ", ".join(missing)))
        elif isinstance(value, list):
            rows += [(name, str(item)) for item in value or ["none"]]
        else:
            rows.append((name, str(value)))
    print_table(rows, "what", "found")


def facts() -> dict[str, Any]:
    """What a bug report needs to know of this machine."""
    import torch

    cuda = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        "fastdiff": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": f"{cpu_name()} ({torch.backends.cpu.get_cpu_capability()})",
        "cores": threads.processors(),
        "cpu_quota": threads.processor_quota(),
        "torch_threads": torch.get_num_threads(),
        "openmp": threads.waiting(),
        "cuda": torch.version.cuda,
        "cuda_devices": [f"{d.name}, {d.total_memory / 2**30:.0f} GiB, {d.major}.{d.minor}" for d in cuda],
        "packages": {name: package_version(name) for name in (*NEEDED, *OPTIONAL)},
    }
