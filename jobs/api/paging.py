"""Lists in pages: `page`, `limit` and an `order` from a short list. No filter reaches the database that is not written down here."""

from __future__ import annotations

from typing import Annotated, TypeVar

from django.db.models import Model, QuerySet
from ninja import Query, Schema
from pydantic import Field

from jobs.api.problems import refuse

Row = TypeVar("Row", bound=Model)
Page = Annotated[int, Query(ge=1, le=1_000_000, description="Which page, from 1.")]
Limit = Annotated[int, Query(ge=1, le=200, description="How many on a page.")]
Order = Annotated[str, Query(max_length=40, description="What to sort by; a minus in front turns it round.")]


class PageInfo(Schema):
    """Where a list stands."""

    count: int = Field(description="How many there are in all.")
    page: int
    limit: int
    num_pages: int


def ordered(rows: QuerySet[Row], order: str, allowed: dict[str, str]) -> QuerySet[Row]:
    """Sort by a name that is allowed; ties are broken by the identifier, so that pages never overlap."""
    column = allowed.get(order.removeprefix("-"))
    if column is None:
        raise refuse(
            422,
            "unknown_order",
            "The list cannot be sorted that way.",
            "Only some columns may be sorted by.",
            f"Use one of: {', '.join(allowed)}, with a minus in front to turn it round.",
            where="query.order",
        )
    sign = "-" if order.startswith("-") else ""
    return rows.order_by(f"{sign}{column}", "pk")


def paged(rows: QuerySet[Row], page: int, limit: int) -> tuple[list[Row], dict[str, int]]:
    """One page of rows, and where it stands."""
    count = rows.count()
    info = {"count": count, "page": page, "limit": limit, "num_pages": max(1, -(-count // limit))}
    return list(rows[(page - 1) * limit : page * limit]), info
