"""Headers that every answer carries, whether it is a page, an error or a file; and pages that travel compressed."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

from asgiref.sync import iscoroutinefunction, markcoroutinefunction
from django.conf import settings
from django.db import InterfaceError, OperationalError
from django.http import HttpRequest, HttpResponse
from django.http.response import HttpResponseBase
from django.middleware.gzip import GZipMiddleware
from django.template.loader import render_to_string
from django.utils.deprecation import MiddlewareMixin

logger = logging.getLogger(__name__)

Answer = HttpResponse | Awaitable[HttpResponse]


def policy(directives: dict[str, str]) -> str:
    """A content security policy as one header line."""
    return "; ".join(f"{name} {sources}" for name, sources in directives.items())


class SecurityHeaders:
    """Only our own scripts run, nobody frames us, and what a person sees is not kept by shared caches."""

    sync_capable = True
    async_capable = True

    def __init__(self, get_response: Callable[[HttpRequest], Answer]) -> None:
        self.get_response = get_response
        self.pages = policy(settings.CONTENT_SECURITY_POLICY)
        self.admin = policy(settings.ADMIN_CONTENT_SECURITY_POLICY)
        if iscoroutinefunction(get_response):
            markcoroutinefunction(self)

    def __call__(self, request: HttpRequest) -> Answer:
        answer = self.get_response(request)
        if isinstance(answer, HttpResponse | Awaitable) and not isinstance(answer, HttpResponse):
            return self._later(request, answer)
        return self.dress(request, answer)  # type: ignore[arg-type]  # a response: awaitables went above

    async def _later(self, request: HttpRequest, answer: Awaitable[HttpResponse]) -> HttpResponse:
        return self.dress(request, await answer)

    def dress(self, request: HttpRequest, response: HttpResponse) -> HttpResponse:
        response.headers.setdefault(
            "Content-Security-Policy", self.admin if request.path.startswith("/admin/") else self.pages
        )
        response.headers.setdefault("X-Content-Type-Options", "nosniff")
        response.headers.setdefault("Permissions-Policy", "camera=(), geolocation=(), microphone=(), payment=()")
        response.headers.setdefault("Cross-Origin-Resource-Policy", "same-origin")
        response.headers.setdefault("Cache-Control", "private, no-cache")
        return response


class DatabaseAway(MiddlewareMixin):
    """A page whose database does not answer in time says so in a sentence; the REST API has its own words for it."""

    def process_exception(self, request: HttpRequest, exception: Exception) -> HttpResponse | None:
        """Called by Django with what a view raised."""
        if not isinstance(exception, OperationalError | InterfaceError):
            return None
        logger.warning("The database did not answer in time: %s", exception)
        return HttpResponse(render_to_string("503.html"), status=503, headers={"Retry-After": "5"})


class CompressPages(GZipMiddleware):
    """Pages travel compressed. Nothing else does: downloads have ranges and tags that compression would break. Django adds random bytes to each
    answer, and CSRF tokens are masked anew each time, so that lengths tell nothing about secrets (BREACH)."""

    def process_response(self, request: HttpRequest, response: HttpResponseBase) -> HttpResponseBase:
        kind = response.get("Content-Type", "")
        if response.streaming or not kind.startswith("text/html"):
            return response
        compressed: HttpResponseBase = super().process_response(request, response)
        return compressed
