"""Where the API's addresses are put together: /api/v1/…, its schema at openapi.json and its documentation at docs, all served from here."""

from __future__ import annotations

from typing import Any

from django.http import Http404, HttpRequest
from django.urls import URLPattern, URLResolver, re_path
from ninja import NinjaAPI
from ninja.errors import HttpError, ValidationError
from ninja.openapi.docs import Swagger

from engine import __version__
from jobs.api import accounts, artifacts, catalogue, datasets, problems
from jobs.api import jobs as jobs_routes
from jobs.api.auth import AUTH
from jobs.api.reading import REQUESTS, WRITES, StrictParser
from jobs.api.schemas import ProblemOut

DESCRIPTION = """Train, follow and take home from a program what the pages do by hand.

Sign in with a personal token: `Authorization: Bearer bonsai_…`. Refusals are `application/problem+json` with everything that is wrong at
once: where, what, why, and the way out. What belongs to somebody else is answered like what does not exist."""
REFUSALS = {
    "400": "The request could not be read.",
    "401": "Not signed in.",
    "403": "Not allowed.",
    "404": "There is nothing there, or it is not yours.",
    "409": "Not possible in this state.",
    "413": "Too large.",
    "422": "Something in the request is wrong.",
    "429": "Too often.",
}


class Api(NinjaAPI):
    """Ninja's API, with every refusal as a problem: also a wrong method, and in the documentation."""

    def _get_urls(self) -> list[URLResolver | URLPattern]:
        urls = super()._get_urls()
        for pattern in urls:
            if isinstance(pattern, URLPattern):
                pattern.callback = _explained(pattern.callback)
        return [
            *urls,
            re_path(r"^[\s\S]*$", _explained(_nowhere)),
        ]  # last; the pattern also takes line breaks, which no converter does

    def get_openapi_schema(self, **kwargs: Any) -> Any:
        schema = super().get_openapi_schema(**kwargs)
        schema["components"]["schemas"]["ProblemOut"] = PROBLEM["schema"]
        content = {problems.CONTENT_TYPE: {"schema": {"$ref": "#/components/schemas/ProblemOut"}}}
        for path in schema["paths"].values():
            for operation in path.values():
                for status, sentence in REFUSALS.items():
                    operation["responses"].setdefault(int(status), {"description": sentence, "content": content})
        return schema


def _explained(view: Any) -> Any:
    def explained(request: HttpRequest, *args: Any, **kwargs: Any) -> Any:
        try:
            return problems.explain_method(view(request, *args, **kwargs), request.method)
        except Http404 as error:  # no route of ninja's, so none of its handlers
            return problems.handle(request, error)

    explained.csrf_exempt = True  # type: ignore[attr-defined]  # PageAuth checks it, because programs with a token need none
    return explained


def _nowhere(request: HttpRequest) -> None:
    raise Http404


def _problem_schema() -> dict[str, Any]:
    schema = ProblemOut.model_json_schema()
    schema["properties"]["faults"]["items"] = schema.pop("$defs")["FaultOut"]
    return schema


PROBLEM = {"schema": _problem_schema()}
api = Api(
    title="Bonsai Studio",
    version=__version__,
    description=DESCRIPTION,
    urls_namespace="api",
    auth=AUTH,
    throttle=[REQUESTS, WRITES],
    parser=StrictParser(),
    docs=Swagger(
        {"validatorUrl": None, "persistAuthorization": False, "tryItOutEnabled": True}
    ),  # no badge from another host
)
for kind in (Exception, Http404, HttpError, ValidationError):  # the four that ninja handles in its own way otherwise
    api.add_exception_handler(kind, problems.handle)

api.add_router("/datasets", datasets.router)
api.add_router("/models", catalogue.models_router)
api.add_router("/methods", catalogue.methods_router)
api.add_router("/tasks", catalogue.tasks_router)
api.add_router("/jobs", jobs_routes.router)
api.add_router("/artifacts", artifacts.router)
api.add_router("/tokens", accounts.tokens_router)
api.add_router("/health", accounts.health_router)
