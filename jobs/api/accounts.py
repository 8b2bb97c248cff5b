"""Personal tokens, and whether the studio is well."""

from __future__ import annotations

import logging
from typing import Any

from django.db import DatabaseError, connection
from django.http import HttpRequest, HttpResponse
from ninja import Router, Status

from engine import __version__
from jobs import access, tokens
from jobs.api.auth import who
from jobs.api.paging import Limit, Order, Page, ordered, paged
from jobs.api.problems import NOT_FOUND, Problem, refuse
from jobs.api.schemas import HealthOut, TokenCreated, TokenIn, TokenList, token_out
from jobs.catalogue import engine

logger = logging.getLogger(__name__)
tokens_router = Router(tags=["tokens"])
health_router = Router(tags=["health"])
ORDERS = {"created": "created", "name": "name", "last_used": "last_used"}


@tokens_router.get("", response=TokenList, summary="List your tokens")
def list_tokens(request: HttpRequest, page: Page = 1, limit: Limit = 50, order: Order = "-created") -> Any:
    """Yours only, also for staff. The secret of a token is shown once, when it is made."""
    rows, info = paged(ordered(access.tokens_for(who(request)), order, ORDERS), page, limit)
    return {**info, "items": [token_out(row) for row in rows]}


@tokens_router.post("", response={201: TokenCreated}, summary="Make a token")
def create_token(request: HttpRequest, response: HttpResponse, payload: TokenIn) -> Any:
    """Keep the secret in `token` at once: only its hash is stored."""
    try:
        row, secret = tokens.issue(who(request), payload.name)
    except tokens.TooManyTokens:
        raise refuse(
            409,
            "quota",
            "You have as many tokens as one person may have.",
            f"That is {tokens.MAX_TOKENS}.",
            "Revoke one that you no longer use.",
        ) from None
    response["Cache-Control"] = "no-store"
    return Status(201, {**token_out(row), "token": secret})


@tokens_router.delete("/{int:token_id}", response={204: None}, summary="Revoke a token")
def revoke_token(request: HttpRequest, token_id: int) -> Any:
    """It opens nothing from the next request on."""
    row = access.tokens_for(who(request)).filter(pk=token_id, revoked=False).first() if token_id < 2**63 else None
    if row is None:
        raise Problem(404, NOT_FOUND)
    tokens.revoke(row)
    return Status(204, None)


@health_router.get("", response={200: HealthOut, 503: HealthOut}, summary="Whether the studio can work", auth=None)
def health(request: HttpRequest) -> Any:
    """For load balancers and watchers; needs no token and tells nothing about anyone."""
    database, resident = _database_answers(), engine().alive()
    message = "Everything answers."
    if not resident:
        message = "The engine service does not listen; checks and predictions start a process each and are slow."
    if not database:
        message = "The database does not answer."
    body = {
        "status": "ok" if database and resident else "degraded",
        "message": message,
        "database": database,
        "engine": resident,
        "version": __version__,
    }
    return Status(200 if database else 503, body)


def _database_answers() -> bool:
    try:
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1")
            return bool(cursor.fetchone() == (1,))
    except DatabaseError as error:
        logger.error("The database does not answer: %s", error)
        return False
