"""Tags for every page: icons, words, terms, cost marks, plants and sparklines."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

from django import template
from django.templatetags.static import static
from django.utils import timezone
from django.utils.html import format_html, format_html_join
from django.utils.safestring import SafeString
from django.utils.text import slugify
from django.utils.timesince import timesince

from jobs.comparing import MOST
from jobs.forks import Branch
from jobs.models import Job, Status
from studio.pages import telling, words
from studio.pages.dials import Dial, setting_words
from studio.pages.glossary import GLOSSARY

register = template.Library()
register.filter("number", words.number)
register.filter("short", words.short)
register.filter("size", words.size)
register.filter("duration", words.duration)
register.filter("spoken", words.spoken)
register.filter("progress_words", words.progress)
register.filter("health_words", words.health)
register.filter("headline", words.headline)
register.filter("setting_words", setting_words)


@register.filter
def difference_words(changes: Sequence[tuple[str, Any, Any]]) -> str:
    """What differs between two recipes, as one phrase; after the fourth it is only counted."""
    told = [telling.difference(*change) for change in changes[:4]]
    if len(changes) > 4:
        told.append(f"{len(changes) - 4} more")
    return telling.capital(words.spoken(told))


@register.filter
def family_query(branch: Branch) -> str:
    """The address of a comparison of a run and those that came from it, the oldest first."""

    def all_of(one: Branch) -> list[Branch]:
        return [one, *(found for child in one.children for found in all_of(child))]

    return "&".join(f"run={found.job.pk}" for found in all_of(branch)[:MOST])


@register.filter
def counted(value: int | None, noun: str) -> str:
    """{{ 3|counted:"row" }} or {{ 3|counted:"entry,entries" }}."""
    one, _, many = noun.partition(",")
    return words.count(value, one, many)


@register.filter
def other_choices(dial: Dial) -> list[str]:
    """What else a dial offers besides its default."""
    return [setting_words(choice) for choice in dial.choices if choice != dial.default]


@register.filter
def get(mapping: Any, key: Any) -> Any:
    """{{ mapping|get:key }}, empty when there is none."""
    return mapping.get(key, "") if hasattr(mapping, "get") else ""


@register.filter
def percent(part: float | int | None, whole: float | int | None = 1) -> int:
    """A share of 100, rounded."""
    return round(100 * (part or 0) / whole) if whole else 0


@register.filter
def ago(moment: datetime | None) -> str:
    """How long ago, to one unit: "just now", "3 hours ago"."""
    if moment is None:
        return ""
    return "just now" if timezone.now() - moment < timedelta(minutes=1) else f"{timesince(moment, depth=1)} ago"


@register.simple_tag
def icon(name: str, kind: str = "") -> SafeString:
    """An icon of our own sprite. It is decoration: the word beside it says what it means."""
    return format_html(
        '<svg class="icon {}" aria-hidden="true"><use href="{}#{}"></use></svg>', kind, static("img/icons.svg"), name
    )


@register.simple_tag
def status(job: Job) -> SafeString:
    """The state of a run as a shape and a word."""
    state = Status(job.status)
    return format_html(
        '<span class="status {}">{} {}</span>', state.value, icon(words.STATUS_ICONS[state]), words.STATUS_WORDS[state]
    )


@register.simple_tag(takes_context=True)
def term(context: template.RequestContext, name: str, shown: str = "") -> SafeString:
    """A term of the field with a dotted underline that opens one sentence; needs no script."""
    sentence = GLOSSARY[name]
    request = context["request"]
    request.num_terms = getattr(request, "num_terms", 0) + 1  # one page may explain a word twice
    anchor = f"term-{slugify(name)}-{request.num_terms}"
    return format_html(
        '<button type="button" class="term" popovertarget="{0}">{1}</button>'
        '<span popover id="{0}" class="popup"><strong>{2}</strong>{3}</span>',
        anchor, shown or name, name[:1].upper() + name[1:], sentence,
    )  # fmt: skip


COST_WORDS = {"time": "time", "memory": "memory", "size": "size"}


@register.simple_tag
def marks(cost: dict[str, int] | None) -> SafeString:
    """Cost marks from 1 (light) to 5 (heavy), as dots and as words for those who cannot see them."""
    if not cost:
        return SafeString("")
    items = format_html_join(
        "",
        '<li><span>{}</span><span class="dots" aria-hidden="true">{}</span><span class="visually-hidden">{} of 5</span></li>',
        (
            (
                COST_WORDS.get(name, name),
                format_html_join("", '<i class="{}"></i>', (("on" if mark < value else "",) for mark in range(5))),
                value,
            )
            for name, value in cost.items()
        ),
    )
    return format_html('<ul class="marks">{}</ul>', items)


def _pad(x: float, y: float, width: float) -> SafeString:
    """A cushion of foliage: a flat base with three bumps on top."""
    half, height = width / 2, width * 0.42
    path = (
        f"M{x - half:.1f} {y:.1f}c{-width * 0.16:.1f} 0 {-width * 0.18:.1f} {-height * 0.5:.1f} {width * 0.05:.1f} {-height * 0.55:.1f}"
        f"c{width * 0.04:.1f} {-height * 0.62:.1f} {width * 0.4:.1f} {-height * 0.75:.1f} {width * 0.5:.1f} {-height * 0.3:.1f}"
        f"c{width * 0.2:.1f} {-height * 0.3:.1f} {width * 0.42:.1f} {height * 0.05:.1f} {width * 0.36:.1f} {height * 0.36:.1f}"
        f"c{width * 0.17:.1f} {height * 0.06:.1f} {width * 0.17:.1f} {height * 0.49:.1f} {width * 0.02:.1f} {height * 0.49:.1f}z"
    )
    return format_html('<path class="leaf" d="{}"/>', path)


@register.simple_tag
def plant(cost: dict[str, int] | None, slug: str = "") -> SafeString:
    """The method as a small tree: tall means slow, wide means much memory, a large pot means a large result."""
    cost = cost or {"time": 2, "memory": 2, "size": 2}
    grain = zlib.crc32(slug.encode())
    lean = 1 if grain % 2 else -1
    sway = 2 + grain // 2 % 4
    pot = 26 + 7 * cost["size"]
    rise = 27 + 8.5 * cost["time"]
    crown = 25 + 6.5 * cost["memory"]
    ground = 86.0
    top = ground - rise
    parts = [
        format_html(
            '<path class="trunk" stroke-width="{}" d="M50 {}C{} {} {} {} {} {}"/>',
            2.5 + cost["size"] * 0.4, ground, 50 - lean * sway * 2.4, ground - rise * 0.4, 50 + lean * sway * 2.2,
            round(ground - rise * 0.62, 1), 50 + lean * sway * 0.6, round(top, 1),
        ),
        _pad(50 + lean * sway * 0.6, top + 2, crown),
    ]  # fmt: skip
    if cost["time"] > 1:
        side, low = 50 + lean * crown * 0.42, ground - rise * 0.5
        parts.append(
            format_html(
                '<path class="trunk" stroke-width="2" d="M50 {}L{} {}"/>',
                ground - rise * 0.34,
                round(side, 1),
                round(low, 1),
            )
        )
        parts.append(_pad(side, low + 1, crown * 0.55))
    if cost["time"] > 3:
        side, low = 50 - lean * crown * 0.45, ground - rise * 0.68
        parts.append(
            format_html(
                '<path class="trunk" stroke-width="2" d="M50 {}L{} {}"/>',
                round(ground - rise * 0.5, 1),
                round(side, 1),
                round(low, 1),
            )
        )
        parts.append(_pad(side, low + 1, crown * 0.45))
    half = pot / 2
    parts.append(format_html('<path class="pot" d="M{} {}h{}l{} 11h{}z"/>', 50 - half, ground, pot, -4, -(pot - 8)))
    body = format_html_join("", "{}", ((part,) for part in parts))
    return format_html('<svg class="plant" viewBox="0 0 100 100" aria-hidden="true">{}</svg>', body)


@register.simple_tag
def sparkline(values: Sequence[float | None], label: str) -> SafeString:
    """A curve without axes; `label` says in words what it shows."""
    points = [(index, value) for index, value in enumerate(values) if value is not None]
    if len(points) < 2:
        return SafeString("")
    low, high = min(value for _, value in points), max(value for _, value in points)
    span, last = (high - low) or 1.0, points[-1][0] or 1
    path = " ".join(f"{200 * index / last:.1f},{4 + 52 * (high - value) / span:.1f}" for index, value in points)
    end = path.rpartition(" ")[2].replace(",", " ")
    return format_html(
        '<svg class="spark" viewBox="0 0 200 60" preserveAspectRatio="none" role="img" aria-label="{}">'
        '<path class="floor" d="M0 59.5H200"/><polyline class="line" points="{}"/><path class="tip" d="M{}h0"/></svg>',
        label, path, end,
    )  # fmt: skip


@register.simple_tag
def bar(part: float | int, most: float | int) -> SafeString:
    """One bar of a list of shares."""
    return format_html(
        '<svg viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true"><rect width="{}" height="8"/></svg>',
        round(100 * part / most, 1) if most else 0,
    )
