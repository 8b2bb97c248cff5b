"""The request as a page sees it behind the login: with a person, and with what htmx says about itself; and how a refusal is told."""

from __future__ import annotations

from django.contrib import messages
from django.contrib.auth.models import User
from django.http import HttpRequest
from django_htmx.middleware import HtmxDetails

from jobs import actions
from jobs.plain import Refused, faults_of


def tell_refusal(request: HttpRequest, error: actions.ActionRefused | Refused) -> None:
    """Say on the next page why something could not be done: the sentence, or every fault."""
    if isinstance(error, actions.ActionRefused):
        messages.warning(request, str(error))
        return
    for fault in faults_of(error):
        messages.error(request, f"{fault['what']} {fault['why']} {fault['way_out']}")


class PageRequest(HttpRequest):
    """A request of somebody who is logged in."""

    user: User
    htmx: HtmxDetails
