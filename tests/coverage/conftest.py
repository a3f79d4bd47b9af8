"""What tests of torch.compile count with."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch

from tests.coverage.graphs import GRAPHS, Graphs


@pytest.fixture
def graphs() -> Iterator[Graphs]:
    trace = logging.getLogger("torch.__trace")  # pytest would keep a line for each tensor of each graph
    GRAPHS.__init__()
    torch._dynamo.reset()
    trace.propagate = False
    yield GRAPHS
    trace.propagate = True
    torch._dynamo.reset()
