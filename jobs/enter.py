"""The link that `manage.py up` prints: it logs its reader in, once, for half an hour."""

from __future__ import annotations

import hashlib

from django.contrib.auth import get_user_model, login
from django.contrib.auth.models import User
from django.core import signing
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect
from django.shortcuts import render
from django.utils import timezone
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_GET

SALT = "jobs.enter"
SECONDS = 1800


def entry_token(user: User) -> str:
    """A signed token that dies with the next login, with a change of password, or after half an hour."""
    return signing.dumps([user.pk, _state(user)], salt=SALT)


def _state(user: User) -> str:
    return hashlib.sha256(f"{user.password}{user.last_login}".encode()).hexdigest()[:32]


@never_cache
@require_GET
def enter(request: HttpRequest, token: str) -> HttpResponse:
    """Log the bearer of a fresh token in and show the first page."""
    user = _redeem(token)
    if user is not None:
        login(request, user, backend="django.contrib.auth.backends.ModelBackend")
        return HttpResponseRedirect("/")
    if request.user.is_authenticated:  # the link was clicked twice
        return HttpResponseRedirect("/")
    return render(request, "jobs/stale_link.html", status=410)


def _redeem(token: str) -> User | None:
    try:
        pk, state = signing.loads(token, salt=SALT, max_age=SECONDS)
    except (signing.BadSignature, ValueError, TypeError):
        return None
    users = get_user_model().objects
    user = users.filter(pk=pk, is_active=True).first()
    if user is None or _state(user) != state:
        return None
    # Compare and swap: of two requests with one token, one gets in.
    won = users.filter(pk=pk, last_login=user.last_login).update(last_login=timezone.now())
    return user if won else None
