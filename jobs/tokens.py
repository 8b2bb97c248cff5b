"""Personal tokens for the REST API: shown once, kept only as a hash, revoked at any time."""

from __future__ import annotations

import hashlib
import secrets
from datetime import timedelta

from django.contrib.auth.models import User
from django.utils import timezone

from jobs.models import ApiToken

PREFIX = "bonsai_"
MAX_TOKENS = 50
SHOWN = 12  # characters of the secret that lists show, so that people can tell their tokens apart
REMEMBER_EVERY = timedelta(minutes=1)


class TooManyTokens(Exception):
    """The person already has as many tokens as anyone needs."""


def issue(owner: User, name: str) -> tuple[ApiToken, str]:
    """Make a token; returns it with its secret, which nobody can read again later."""
    if ApiToken.objects.filter(owner=owner, revoked=False).count() >= MAX_TOKENS:
        raise TooManyTokens
    secret = PREFIX + secrets.token_urlsafe(32)
    return ApiToken.objects.create(owner=owner, name=name, prefix=secret[:SHOWN], digest=_digest(secret)), secret


def authenticate(secret: str) -> ApiToken | None:
    """The live token with this secret, whose owner may still sign in; notes when it was used (to the minute)."""
    if not secret.startswith(PREFIX) or len(secret) > 200:
        return None
    token = ApiToken.objects.select_related("owner").filter(digest=_digest(secret), revoked=False).first()
    if token is None or not token.owner.is_active:
        return None
    now = timezone.now()
    if token.last_used is None or now - token.last_used > REMEMBER_EVERY:
        token.last_used = now
        ApiToken.objects.filter(pk=token.pk).update(last_used=now)
    return token


def revoke(token: ApiToken) -> None:
    """From now on the token opens nothing; the row stays, so that lists show what once existed."""
    token.revoked = True
    token.save(update_fields=["revoked"])


def _digest(secret: str) -> str:
    # The secret has 256 random bits, so a plain hash cannot be guessed back; a slow one would only slow every request down.
    return hashlib.sha256(secret.encode(errors="replace")).hexdigest()
