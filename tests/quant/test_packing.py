"""Formats: exact bytes, inverse up to rounding, and what each is for."""

import pytest
import torch

from fastdiff.errors import UnknownName
from fastdiff.quant import grids
from fastdiff.quant.activations import quantized
from fastdiff.quant.packing import FORMATS, Dual4, format_named
from fastdiff.quant.rounding import from_nibbles, hadamard, nibbles

# relative squared error of normal weights, g64: what the formats promise
PROMISED = {
    "int8": 1e-4,
    "int4": 9.5e-3,
    "dual4": 9e-3,
    "normal4": 1e-2,
    "normal3": 3.7e-2,
    "normal2": 0.122,
    "float8": 1e-3,
    "half": 1e-6,
}
SHAPES = [(64, 512), (48, 432), (5, 7), (3, 33), (1, 1), (2, 130)]


def packed(name, weight, group=64, rounding="mse"):
    return FORMATS[name].pack(weight, group, rounding)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("group", [2, 20, 64])
def test_bytes_are_those_of_the_formula_and_the_shape_comes_back(name, shape, group):
    tensors = packed(name, torch.randn(shape), group)
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == FORMATS[name].bytes(*shape, group)
    assert FORMATS[name].unpack(tensors, shape[1]).shape == shape


@pytest.mark.parametrize("name", FORMATS)
def test_error_is_as_promised(name):
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    error = (FORMATS[name].unpack(packed(name, weight), 512) - weight).square().sum() / weight.square().sum()
    assert error < PROMISED[name]


@pytest.mark.parametrize("name", ["int4", "dual4"])
def test_clipping_search_is_never_worse_by_its_own_measure(name):
    weight = torch.randn(32, 256, generator=torch.Generator().manual_seed(1)) ** 3  # outliers

    def error(rounding):
        found = FORMATS[name].unpack(packed(name, weight, rounding=rounding), 256)
        return (found - weight).abs().pow(2.4).sum()

    assert error("mse") < error("nearest")


@pytest.mark.parametrize("name", FORMATS)
def test_zero_channels_stay_zero(name):
    weight = torch.randn(4, 96)
    weight[2] = 0
    found = FORMATS[name].unpack(packed(name, weight, 32), 96)
    assert torch.equal(found[2], torch.zeros(96))
    assert found.isfinite().all()


def test_int4_holds_16_levels_exactly():
    weight = (torch.arange(16) - 8).float().repeat(3, 4)
    assert torch.equal(FORMATS["int4"].unpack(packed("int4", weight, 16, "nearest"), 64), weight)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("group", [2, 20, 64])
def test_dual_grained_weights_are_8_bit_integers_and_come_back_from_them(shape, group):
    kind = FORMATS["dual4"]
    assert isinstance(kind, Dual4)
    tensors = packed("dual4", torch.randn(shape) * 3 + 1, group)
    eight = kind.eight_bits(tensors, shape[1])
    assert eight.dtype == torch.int8
    assert torch.equal(eight.float() * tensors["scale"][:, None], kind.unpack(tensors, shape[1]))
    assert torch.equal(kind.back(eight, {k: t for k, t in tensors.items() if k != "q"}, group), tensors["q"])


def test_nibbles():
    numbers = torch.randint(0, 16, (5, 8))
    assert torch.equal(from_nibbles(nibbles(numbers)), numbers.to(torch.uint8))


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("width", [2, 6, 8, 130])
def test_numbers_of_few_bits_take_so_many_bits_and_come_back(bits, width):
    numbers = torch.randint(0, 1 << bits, (5, width))
    held = grids.in_bytes(numbers, bits)
    assert held.dtype == torch.uint8 and held.shape == (5, width // 2 if bits == 4 else -(-width // 8) * bits)
    assert torch.equal(grids.from_bytes(held, bits, width).long(), numbers)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_levels_are_each_the_mean_of_what_is_rounded_to_it(bits):
    """Lloyd's condition on N(0, 1), whose mean between a and b is (p(a) - p(b)) / (P(b) - P(a))."""
    levels = grids.normal_levels(bits, torch.device("cpu")).double()
    assert len(levels) == 1 << bits
    edges = torch.cat([torch.tensor([-40.0]), (levels[1:] + levels[:-1]) / 2, torch.tensor([40.0])])
    normal = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), 1)
    density, below = normal.log_prob(edges).exp(), normal.cdf(edges)
    torch.testing.assert_close((density[:-1] - density[1:]) / below.diff(), levels, atol=2e-4, rtol=0)


@pytest.mark.parametrize("size", [1, 2, 8, 64])
def test_hadamard_is_its_own_inverse_and_keeps_lengths(size):
    x = torch.randn(3, size)
    torch.testing.assert_close(hadamard(hadamard(x)), x)
    torch.testing.assert_close(hadamard(x).norm(dim=-1), x.norm(dim=-1))


def test_unknown_format():
    with pytest.raises(UnknownName, match="int4"):
        format_named("int5")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", FORMATS)
def test_a_weight_is_rounded_once_to_the_type_asked_for(name, dtype):
    weight = torch.randn(24, 70, generator=torch.Generator().manual_seed(0))
    packed = FORMATS[name].pack(weight, 32, "nearest")
    found = FORMATS[name].unpack(packed, 70, dtype)
    assert found.dtype == dtype and torch.equal(found, FORMATS[name].unpack(packed, 70).to(dtype))


def test_scales_of_rows_in_half_precision_are_exact():
    rows = torch.randn(9, 40, generator=torch.Generator().manual_seed(0)).bfloat16()
    levels = quantized(rows, 255)
    assert levels.scale.dtype == torch.float32
    assert torch.equal(levels.scale, rows.float().abs().amax(-1, keepdim=True) / 127)
