"""Requests made up from the server's own OpenAPI document, good and bad: it never fails, and keeps its word."""

from __future__ import annotations

import hypothesis
import pytest
import schemathesis
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from .conftest import Server

CHECKS = [
    not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance,
    negative_data_rejection,
]  # fmt: skip


@pytest.fixture(scope="module")
def document(server: Server):
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/images/generations"),
        ("GET", "/v1/models"),
        ("GET", "/v1/models/{name}"),
        ("GET", "/health"),
        ("GET", "/v1/videos"),
        ("GET", "/v1/videos/{name}"),
    ],
)
@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_made_up_requests(server: Server, document, method: str, path: str, mode: str) -> None:
    operation = document[path][method]
    made = operation.as_strategy(generation_mode=schemathesis.GenerationMode(mode))

    @hypothesis.given(case=made)
    @hypothesis.settings(
        max_examples=25, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    def check(case) -> None:
        if isinstance(case.body, dict) and isinstance(steps := case.body.get("steps"), int | None):
            case.body["steps"] = 2 if steps is None else min(steps, 2)
        case.call_and_validate(checks=CHECKS, timeout=900)

    try:
        check()
    except hypothesis.errors.Unsatisfiable:
        assert mode == "negative"  # where everything is allowed nothing can be wrong
    assert server.draw()[0] == 200
