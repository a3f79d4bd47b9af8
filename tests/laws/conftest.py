"""Every method on every tiny family; two families that are built like another one are left to `make test-slow`."""

from __future__ import annotations

import pytest

LIKE_ANOTHER = ("sdxl", "cogvideox")  # a larger sd15, and a video transformer beside wan


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "/laws/" in item.nodeid and any(name in item.nodeid for name in LIKE_ANOTHER):
            item.add_marker(pytest.mark.slow)
