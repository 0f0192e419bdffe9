"""The OpenAPI schema is true: schemathesis makes requests from it and looks at every answer."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from ..serving import served

SECONDS = 20
# Of each operation; `make faults` asks for more.
EXAMPLES = 8


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with served(tmp_path_factory.mktemp("server"), limit=2) as (running, _):
        yield running


@pytest.fixture(scope="module")
def api_schema(address: str) -> schemathesis.schemas.BaseSchema:
    # Streams that never end have their own tests.
    found = schemathesis.openapi.from_url(f"{address}/openapi.json")
    return found.exclude(path="/api/events")


def test_answers_are_what_the_schema_says(api_schema: schemathesis.schemas.BaseSchema) -> None:
    tried = 0
    for found in api_schema.get_all_operations():
        operation = found.ok()

        @settings(
            max_examples=EXAMPLES, deadline=None, phases=(Phase.explicit, Phase.generate), derandomize=True,
            database=None, suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(case=operation.as_strategy())
        def try_one(case: schemathesis.Case) -> None:
            nonlocal tried
            tried += 1
            check(case)

        try_one()
    assert tried > 100


def check(case: schemathesis.Case) -> None:
    """Send it and look at the answer."""
    for name, value in (("steps", 1), ("width", 64), ("height", 64), ("count", 1), ("n", 1)):
        # Valid requests are drawn, so they are kept small.
        if isinstance(case.body, dict) and isinstance(case.body.get(name), int):
            case.body[name] = min(case.body[name], value)
    response = case.call(timeout=SECONDS)
    checks = [not_a_server_error, content_type_conformance, response_schema_conformance, status_code_conformance]
    case.validate_response(response, checks=checks)


def test_the_page_of_the_schema_names_every_api(address: str) -> None:
    paths = httpx.get(f"{address}/openapi.json").json()["paths"]
    for path in ("/v1/images/generations", "/v1/images/edits", "/sdapi/v1/txt2img", "/api/jobs", "/health", "/metrics"):
        assert path in paths
