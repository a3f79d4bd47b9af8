"""A dynamo backend that counts: graphs, what they read, and how often they run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Graphs:
    """What a dynamo backend was given: operations of each graph, and for each execution the inputs it read."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.executed: list[tuple[int, set[int]]] = []

    def __call__(self, module: torch.fx.GraphModule, _inputs: list[Any]) -> Callable[..., Any]:
        number = len(self.sizes)
        self.sizes.append(sum(node.op.startswith("call") for node in module.graph.nodes))

        def executed(*args: Any) -> Any:
            self.executed.append((number, {id(arg) for arg in args}))
            return module.forward(*args)

        return executed

    def reads(self, weight: Tensor) -> int:
        """How many executions used a weight."""
        return sum(id(weight) in read for _, read in self.executed)


GRAPHS = Graphs()
torch._dynamo.register_backend(lambda module, inputs: GRAPHS(module, inputs), name="fastdiff_counted")


def compiled(scope: str, **more: Any) -> dict[str, Any]:
    return {"enabled": True, "scope": scope, "backend": "fastdiff_counted", "fullgraph": True} | more
