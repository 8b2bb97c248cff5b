"""Refusals as application/problem+json: {type, title, status, detail, faults: [{where, what, why, way_out, code}]}."""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from django.core.exceptions import PermissionDenied, RequestDataTooBig, SuspiciousOperation
from django.db import InterfaceError, OperationalError
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseNotAllowed
from django.http.multipartparser import MultiPartParserError
from django.http.response import HttpResponseBase
from ninja.errors import AuthenticationError, HttpError, Throttled, ValidationError

from engine.core.errors import EngineError, Fault, RecipeError

logger = logging.getLogger(__name__)
CONTENT_TYPE = "application/problem+json"
RETRY_SECONDS = 5  # while the database does not answer
# What a refusal by the engine means to a client: whose turn it is to act.
STATUS_OF_REASON = {"bad_input": 422, "out_of_memory": 422, "diverged": 422, "environment": 503, "bug": 500}
NOT_FOUND = Fault(
    where="path",
    what="There is nothing at this address.",
    why="It never existed, was deleted, or is not yours.",
    way_out="Look at the list it came from; /api/v1/docs has every address.",
    code="not_found",
)


class Problem(Exception):
    """A refusal with its status; raise it anywhere below a route."""

    def __init__(self, status: int, faults: Fault | Iterable[Fault], headers: Mapping[str, str] | None = None) -> None:
        self.status = status
        self.faults = (faults,) if isinstance(faults, Fault) else tuple(faults)
        self.headers = dict(headers or {})
        super().__init__(str(self.faults[0]))

    def response(self) -> HttpResponse:
        first = self.faults[0]
        more = f" And {len(self.faults) - 1} more." if len(self.faults) > 1 else ""
        body = {
            "type": f"urn:bonsai:{first.code}",
            "title": first.what,
            "status": self.status,
            "detail": f"{first}{more}",
            "faults": [fault.to_dict() for fault in self.faults],
        }
        return HttpResponse(json.dumps(body), status=self.status, content_type=CONTENT_TYPE, headers=self.headers)


class Unreadable(Exception):
    """Why a body is not JSON that can be stored; travels through ninja, which wraps whatever its parser raises."""


def refuse(
    status: int,
    code: str,
    what: str,
    why: str,
    way_out: str,
    *,
    where: str = "request",
    headers: Mapping[str, str] | None = None,
) -> Problem:
    """A Problem with one fault, spelled out."""
    return Problem(status, Fault(where=where, what=what, why=why, way_out=way_out, code=code), headers)


def problem_of(error: Exception) -> Problem:
    """The refusal that tells a person what `error` means; an error that nobody foresaw is logged and given a number."""
    match error:
        case Problem():
            return error
        case RecipeError():
            return Problem(422, error.faults)
        case EngineError():
            status = STATUS_OF_REASON.get(error.reason, 500)
            if status == 500:
                logger.error("The engine reports a bug: %s", error)
            return Problem(status, error.fault)
        case ValidationError():
            return Problem(422, [_field_fault(item) for item in error.errors])
        case Http404():
            return Problem(404, NOT_FOUND)
        case PermissionDenied():
            return refuse(
                403,
                "forbidden",
                "This is not allowed.",
                str(error) or "Your account may not do this.",
                "Ask someone with the staff role.",
            )
        case AuthenticationError():
            return refuse(
                401,
                "signed_out",
                "You are not signed in.",
                "This address needs a personal token or a session.",
                "Send 'Authorization: Bearer bonsai_…' with a token from the tokens page.",
                headers={"WWW-Authenticate": 'Bearer realm="Bonsai Studio"'},
            )
        case Throttled():
            return refuse(
                429,
                "too_often",
                "Too many requests.",
                "One person may only ask so often in a minute, so that others get a turn.",
                f"Wait {int(error.wait) + 1 if error.wait else 60} seconds and go on more slowly.",
            )
        case OperationalError() | InterfaceError():
            logger.warning("The database did not answer in time: %s", error)
            return refuse(
                503,
                "database_busy",
                "The database did not answer in time, so nothing was changed.",
                "Another program holds it, for instance a backup, or it is being restarted.",
                f"Ask again in {RETRY_SECONDS} seconds. Runs go on meanwhile.",
                headers={"Retry-After": str(RETRY_SECONDS)},
            )
        case RequestDataTooBig():
            return refuse(
                413,
                "too_large",
                "This request is too large.",
                "Only uploads of data may be large.",
                "Send data with POST /api/v1/datasets, and keep other requests below 2 MB.",
            )
        case MultiPartParserError() | SuspiciousOperation():
            return refuse(
                400,
                "unreadable_form",
                "The form could not be read.",
                "Its parts are not put together as multipart/form-data asks.",
                "Send the file as the field 'file', as in: curl -F file=@rows.csv …",
            )
        case HttpError(__cause__=Unreadable() as cause):
            return refuse(
                400, "unreadable_json", "The body could not be read.", str(cause), "Send UTF-8 JSON.", where="body"
            )
        case HttpError():
            return refuse(
                error.status_code,
                "bad_request",
                "The request could not be read.",
                error.message.rstrip(".") + ".",
                "Correct it and send it again; /api/v1/docs shows what is expected.",
            )
        case _:
            number = secrets.token_hex(4)
            logger.error("Unforeseen error %s", number, exc_info=error)
            return refuse(
                500,
                "bug",
                "Something went wrong inside the studio.",
                f"It is our mistake; the log has the details under {number}.",
                "Try again, and report the number if it happens again.",
            )


def handle(request: HttpRequest, error: Any) -> HttpResponse:
    """Exception handler of the whole API."""
    return problem_of(error).response()


def explain_method(response: HttpResponseBase, method: str | None) -> HttpResponseBase:
    """A 405 in a sentence, with the Allow header kept."""
    if not isinstance(response, HttpResponseNotAllowed):
        return response
    allowed = response["Allow"]
    return refuse(
        405,
        "wrong_method",
        f"This address does not answer to {method}.",
        f"It answers to {allowed}.",
        "Use one of those; /api/v1/docs has every address.",
        where="method",
        headers={"Allow": allowed},
    ).response()


def _field_fault(item: Mapping[str, Any]) -> Fault:
    """One complaint of pydantic about a request, as a sentence."""
    loc: Sequence[Any] = item["loc"]
    where = ".".join(str(part) for part in loc) or "request"
    name, kind, ctx = str(loc[-1]) if loc else "request", str(item["type"]), item.get("ctx", {})
    if kind == "missing":
        return Fault(
            where=where,
            what=f"'{name}' is missing.",
            why="The request cannot be understood without it.",
            way_out=f"Add '{name}'.",
            code="missing",
        )
    if kind == "extra_forbidden":
        return Fault(
            where=where,
            what=f"There is no field called '{name}'.",
            why="It would have been ignored silently.",
            way_out="Remove it.",
            code="unknown_field",
        )
    if kind in {"literal_error", "enum"}:
        return Fault(
            where=where,
            what=f"'{name}' is not one of the choices.",
            why="Other values have no meaning here.",
            way_out=f"Choose one of {ctx.get('expected')}.",
            code="not_a_choice",
        )
    message = str(item["msg"]).removeprefix("Value error, ").rstrip(".")
    return Fault(
        where=where,
        what=f"'{name}' cannot be used as it is.",
        why=f"{message[:1].upper()}{message[1:]}.",
        way_out="Correct the value.",
        code="invalid_value",
    )
