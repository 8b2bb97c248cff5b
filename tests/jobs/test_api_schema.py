"""Whatever fits the schema, and much that does not, is answered as the schema says and never with a 500."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from django.core.cache import cache
from django.core.signals import request_finished, request_started
from django.core.wsgi import get_wsgi_application
from django.db import close_old_connections
from hypothesis import HealthCheck, settings
from schemathesis import checks

from jobs.api import api
from tests.jobs import api_kit as kit

pytestmark = pytest.mark.django_db
CHECKS = [
    checks.not_a_server_error,
    checks.response_schema_conformance,
    checks.content_type_conformance,
    checks.status_code_conformance,
]


schema = schemathesis.openapi.from_dict(api.get_openapi_schema(path_prefix="/api/v1/"))
schema.app = get_wsgi_application()


@pytest.fixture
def owner(db: None) -> Iterator[kit.Caller]:
    """Somebody to ask with. The test's transaction must outlive each request, as with Django's own test client."""
    for moment in (request_started, request_finished):
        moment.disconnect(close_old_connections)
    yield kit.caller("owner")
    for moment in (request_started, request_finished):
        moment.connect(close_old_connections)


@schema.parametrize()
@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_the_api_keeps_to_its_schema(case: Any, owner: kit.Caller) -> None:
    cache.clear()
    case.call_and_validate(headers={"Authorization": f"Bearer {owner.secret}"}, checks=CHECKS)
