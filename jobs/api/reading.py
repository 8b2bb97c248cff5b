"""What the API reads and how often: JSON that every database can store, and so many requests a minute."""

from __future__ import annotations

import json
import math
import re
import time
from typing import Any, NoReturn

from django.core.cache import cache
from django.http import HttpRequest
from ninja.parser import Parser
from ninja.throttling import BaseThrottle

from jobs.api.problems import Unreadable
from jobs.limits import limit

MAX_DEPTH = 40
_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")


class StrictParser(Parser):
    """JSON as the standard has it: no NaN, no doubled key, no text that cannot be stored, no bottomless nesting."""

    def parse_body(self, request: HttpRequest) -> dict[str, Any]:
        try:
            data = json.loads(
                request.body.decode("utf-8"), parse_constant=_refuse_constant, parse_int=_whole, object_pairs_hook=_once
            )
            _check(data, MAX_DEPTH)
        except UnicodeDecodeError:
            raise Unreadable("It is not UTF-8.") from None
        except RecursionError:
            raise Unreadable("It is nested too deeply.") from None
        except json.JSONDecodeError as error:
            raise Unreadable(f"It is not valid JSON: line {error.lineno}, column {error.colno}.") from None
        except ValueError as error:
            raise Unreadable(str(error)) from None
        return data  # type: ignore[no-any-return]  # pydantic looks at its type next


class PerMinute(BaseThrottle):
    """So many requests a minute for each person; the number is read from the settings each time."""

    def __init__(self, name: str, methods: frozenset[str] | None = None) -> None:
        self.name, self.methods = name, methods

    def allow_request(self, request: HttpRequest) -> bool:
        if self.methods is not None and request.method not in self.methods:
            return True
        # ninja's own throttles keep the history of the last request on an object that all threads share; a counter in the cache does not.
        who = request.user.pk if request.user.is_authenticated else self.get_ident(request)
        key = f"api:{self.name}:{who}:{int(time.time() // 60)}"
        cache.add(key, 0, timeout=90)
        try:
            return cache.incr(key) <= limit(self.name)
        except ValueError:  # the cache dropped the key in between
            return True

    def wait(self) -> float:
        return 60 - time.time() % 60


REQUESTS = PerMinute("BONSAI_REQUESTS_PER_MINUTE")
WRITES = PerMinute("BONSAI_WRITES_PER_MINUTE", frozenset({"POST", "PATCH", "PUT", "DELETE"}))
UPLOADS = PerMinute("BONSAI_UPLOADS_PER_MINUTE")
PREDICTIONS = PerMinute("BONSAI_PREDICTIONS_PER_MINUTE")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"It contains {name}, which JSON does not have.")


def _whole(digits: str) -> int:
    if len(digits) > 20 or abs(int(digits)) >= 2**63:
        raise ValueError("It contains a whole number with more than 63 bits.")
    return int(digits)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("It has the same key twice in one object, so its meaning is unclear.")
    return found


def _check(value: Any, depth: int) -> None:
    if depth < 0:
        raise ValueError(f"It is nested more than {MAX_DEPTH} levels deep.")
    if isinstance(value, dict):
        for key, item in value.items():
            _check(key, depth - 1)
            _check(item, depth - 1)
    elif isinstance(value, list):
        for item in value:
            _check(item, depth - 1)
    elif isinstance(value, str):
        if _UNSTORABLE.search(value):
            raise ValueError("It contains a character that cannot be stored: U+0000 or half a pair.")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError("It contains a number that is too large to be stored.")
