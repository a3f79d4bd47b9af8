from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest


class Visitor:
    """Calls a page's functions as the browser would, without one."""

    def __init__(self, page: Any) -> None:
        page.blocks()
        self.page = page
        self.given = {name: part.value for name, part in page.inputs.items()}

    def run(self, settings: Any = (), **changed: Any) -> list[dict[str, Any]]:
        """What each update of the page shows, by the name of the part."""
        request = SimpleNamespace(session_hash="visitor")
        names = {part: name for name, part in self.page.out.items()}
        updates = self.page.draw(self.given | changed, list(settings), request)
        return [{names[part]: value for part, value in update.items()} for update in updates]


@pytest.fixture(scope="session")
def visitor(tmp_path_factory: pytest.TempPathFactory) -> Visitor:
    pytest.importorskip("gradio", reason="the demo needs gradio: pip install 'fastdiff[demo]'")
    from fastdiff.demo.page import Page

    return Visitor(Page([], tmp_path_factory.mktemp("benchmarks")))
