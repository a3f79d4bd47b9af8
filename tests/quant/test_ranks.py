"""Static ranges do not depend on which part of a picture a rank has."""

from tests.parallel.ranks import start


def test_one_and_two_ranks_agree():
    (said,) = start("tests.quant.checks", [(["static_ranges"], 2)])
    for told in said["static_ranges"]:
        assert isinstance(told, dict), told
        assert told["off"] < 1e-3
