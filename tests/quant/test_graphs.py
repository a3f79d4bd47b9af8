"""Quantized layers in graphs: one graph for all timestep buckets, and oneDNN's packed products as operators of it."""

import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from fastdiff.quant.activations import Present
from fastdiff.quant.build import build
from fastdiff.quant.recipe import Recipe


def edges(*tops):
    return {"low": torch.tensor([-top for top in tops]), "high": torch.tensor(tops)}


class Layers(nn.Module):
    """A convolution with static ranges, a dynamic one, a linear layer with static ranges, a dynamic one."""

    def __init__(self, present):
        super().__init__()
        torch.manual_seed(0)
        made = [nn.Conv2d(8, 16, 3, 2, 1), nn.Conv2d(16, 8, 1), nn.Linear(8, 8), nn.Linear(8, 4, bias=False)]
        ranges = [edges(0.3, 4.0, 4.0), {}, edges(0.2, 5.0, 5.0), {}]
        built = [
            build(layer.requires_grad_(False), Recipe("int8", "int8"), present, **own)
            for layer, own in zip(made, ranges, strict=True)
        ]
        self.first, self.second, self.third, self.last = built
        self.floats = made  # a list: no parts of this one
        for layer in built:
            layer.choose_kernel()

    def forward(self, x):
        return through(x, self.first, self.second, self.third, self.last)


def through(x, first, second, third, last):
    return last(third(second(first(x)).flatten(2).transpose(1, 2)))


@torch.no_grad()
def test_one_graph_holds_for_all_buckets():
    torch.manual_seed(0)
    present, x = Present(), torch.randn(2, 8, 9, 9)
    layers, counter = Layers(present), CompileCounterWithBackend("aot_eager")
    assert {layer.kernel_name for layer in layers.children()} <= {"onednn", "onednn_7bit", "reference"}
    compiled, found = torch.compile(layers, backend=counter, fullgraph=True), {}
    for bucket in (0, 1, None, 0):
        present.bucket = bucket
        found[bucket], wanted = compiled(x), layers(x)
        quantized = (wanted - through(x, *layers.floats)).norm()  # a level is larger where a machine has 7 bits
        assert float((found[bucket] - wanted).norm() / quantized) < 0.5, "a level here and there"
    assert counter.frame_count == 1
    assert torch.equal(found[1], found[None]) and float((found[0] - found[1]).norm() / found[1].norm()) > 0.05
