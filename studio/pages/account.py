"""The account: personal tokens, the look, the keyboard, the password."""

from __future__ import annotations

from django.contrib import messages
from django.contrib.auth import update_session_auth_hash
from django.contrib.auth.decorators import login_required
from django.contrib.auth.forms import PasswordChangeForm, SetPasswordForm
from django.http import HttpResponse, HttpResponseRedirect
from django.shortcuts import get_object_or_404, render
from django.urls import reverse
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_GET, require_POST

from jobs import tokens
from jobs.access import tokens_for
from studio.pages.asking import PageRequest

PasswordForm = PasswordChangeForm | SetPasswordForm


@never_cache
@login_required
@require_GET
def account(request: PageRequest) -> HttpResponse:
    """Everything about oneself."""
    return _show(request)


def _show(
    request: PageRequest, secret: str = "", form: PasswordForm | None = None, fault: str = "", status: int = 200
) -> HttpResponse:
    return render(request, "pages/account.html", {
        "tokens": tokens_for(request.user).filter(revoked=False).order_by("-created"), "secret": secret, "fault": fault,
        "form": form or _password_form(request),
    }, status=status)  # fmt: skip


def _password_form(request: PageRequest, data: object = None) -> PasswordForm:
    """Who came in by the printed link may have no password yet, and then has none to repeat."""
    kind = PasswordChangeForm if request.user.has_usable_password() else SetPasswordForm
    form = kind(request.user, data)
    for field in form.fields.values():
        field.widget.attrs.pop("autofocus", None)  # the page is about more than the password
    return form


@never_cache
@login_required
@require_POST
def token_create(request: PageRequest) -> HttpResponse:
    """Make a token and show its secret this once."""
    name = " ".join(request.POST.get("name", "").split())[:100]
    if not name:
        return _show(request, fault="Give the token a name, so that you know later what uses it.", status=422)
    try:
        _, secret = tokens.issue(request.user, name)
    except tokens.TooManyTokens:
        return _show(
            request,
            fault=f"You have {tokens.MAX_TOKENS} tokens already. Revoke one that you no longer use.",
            status=422,
        )
    return _show(request, secret=secret)


@login_required
@require_POST
def token_revoke(request: PageRequest, pk: int) -> HttpResponse:
    """From now on the token opens nothing."""
    token = get_object_or_404(tokens_for(request.user), pk=pk, revoked=False)
    tokens.revoke(token)
    messages.success(request, f"The token “{token.name}” opens nothing any more.")
    return HttpResponseRedirect(reverse("account"))


@never_cache
@login_required
@require_POST
def password(request: PageRequest) -> HttpResponse:
    """Change the password and stay logged in."""
    form = _password_form(request, request.POST)
    if not form.is_valid():
        return _show(request, form=form, status=422)
    update_session_auth_hash(request, form.save())
    messages.success(request, "Your password is changed.")
    return HttpResponseRedirect(reverse("account"))
