"""Addresses of the pages. The first word of a name is the place in the rail that it belongs to."""

from __future__ import annotations

from django.contrib.auth.views import LoginView, LogoutView
from django.urls import URLPattern, URLResolver, path

from studio.pages import account, data, home, methods, models, runs, wizard

urlpatterns: list[URLPattern | URLResolver] = [
    path("", home.home, name="home"),
    path("live/", home.home_live, name="home-live"),
    path("queue/", home.queue, name="queue"),
    path("search/", home.search, name="search"),
    path("help/", home.help_page, name="help"),
    path("new/", wizard.new, name="new"),
    path("data/", data.data, name="data"),
    path("data/<uuid:pk>/", data.dataset, name="dataset"),
    path("data/<uuid:pk>/columns/", data.dataset_mapping, name="dataset-mapping"),
    path("data/<uuid:pk>/delete/", data.dataset_delete, name="dataset-delete"),
    path("models/", models.models, name="models"),
    path("models/<uuid:pk>/", models.model, name="model"),
    path("methods/", methods.methods, name="methods"),
    path("methods/<slug:slug>/", methods.method, name="method"),
    path("account/", account.account, name="account"),
    path("account/tokens/", account.token_create, name="account-token"),
    path("account/tokens/<int:pk>/revoke/", account.token_revoke, name="account-revoke"),
    path("account/password/", account.password, name="account-password"),
    path("login/", LoginView.as_view(template_name="pages/login.html"), name="login"),
    path("logout/", LogoutView.as_view(), name="logout"),
    *runs.urlpatterns,
]
