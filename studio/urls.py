"""Where everything is: pages at the root, the REST API, the admin."""

from django.contrib import admin
from django.urls import include, path

from jobs.api.urls import api
from jobs.enter import enter

urlpatterns = [
    path("admin/", admin.site.urls),
    path("api/v1/", api.urls),
    path("enter/<str:token>/", enter, name="enter"),
    path("", include("studio.pages.urls")),
]
