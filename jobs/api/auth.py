"""Who is asking: a personal token for programs, or the session of the pages, which then needs the CSRF token."""

from __future__ import annotations

from typing import Any, cast

from django.contrib.auth.models import User
from django.http import HttpRequest
from ninja.security import HttpBearer, SessionAuth
from ninja.utils import check_csrf

from jobs import access, tokens
from jobs.api.problems import Problem, refuse


class TokenAuth(HttpBearer):
    """`Authorization: Bearer bonsai_…`. A wrong token is refused and never falls back to the session."""

    def __call__(self, request: HttpRequest) -> User | None:
        value = request.headers.get("Authorization")
        if value is None:
            return None
        scheme, _, secret = value.partition(" ")
        if scheme.lower() != "bearer":
            raise _bad_token("The Authorization header does not start with 'Bearer'.")
        return self.authenticate(request, secret.strip())

    def authenticate(self, request: HttpRequest, token: str) -> User:
        found = tokens.authenticate(token)
        if found is None:
            raise _bad_token("It is misspelled, revoked, or its owner may no longer sign in.")
        request.user = found.owner
        return found.owner


class PageAuth(SessionAuth):
    """The session cookie of the pages; anything that changes something also needs the CSRF token."""

    def __call__(self, request: HttpRequest) -> Any | None:
        if not request.user.is_authenticated:
            return None
        if check_csrf(request):
            raise refuse(
                403,
                "csrf",
                "The request was not accepted.",
                "It changes something and came without the page's CSRF token.",
                "Reload the page and try again; programs use a personal token instead.",
                where="X-CSRFToken",
            )
        return request.user


AUTH = [TokenAuth(), PageAuth()]


def who(request: HttpRequest) -> User:
    """The person behind an authenticated request."""
    return cast(User, request.user)


def require_staff(request: HttpRequest) -> User:
    """The person, who must be staff."""
    user = who(request)
    if not access.is_staff(user):
        raise refuse(
            403,
            "staff_only",
            "Only staff may do this.",
            "It changes what everyone here can use.",
            "Ask someone with the staff role.",
        )
    return user


def _bad_token(why: str) -> Problem:
    return refuse(
        401,
        "bad_token",
        "This token opens nothing.",
        why,
        "Make a new one on the tokens page.",
        where="Authorization",
        headers={"WWW-Authenticate": 'Bearer realm="Bonsai Studio", error="invalid_token"'},
    )
