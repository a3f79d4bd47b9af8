"""Static ranges do not depend on which part of a picture a rank has."""

import pytest

from tests.parallel.ranks import start


@pytest.mark.xdist_group("ranks")
def test_one_and_two_ranks_agree_to_the_last_bits_of_a_sum():
    (said,) = start("tests.quant.checks", [(["static_ranges"], 2)])
    for told in said["static_ranges"]:
        assert isinstance(told, dict), told
        assert told["sd15"] < 1e-12 and told["sd3"] < 1e-12
        assert told["dynamic"] > 1e-4, "ranges of a part of the picture are others"
