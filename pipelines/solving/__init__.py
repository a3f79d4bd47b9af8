"""The solver lever: at which noise levels a model is called, and with which weights its outputs are summed."""

from fastdiff.registry import Registry

METHODS = {"fitted": "fastdiff.pipelines.solving.fitted:Fitted"}
REGISTRY = Registry("solver", METHODS)
