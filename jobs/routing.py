"""Where websockets arrive."""

from django.urls import path, re_path

from jobs.consumers import nowhere, watch

websocket_urlpatterns = [
    path("ws/jobs/<uuid:job_id>/", watch),  # type: ignore[arg-type]  # channels routes ASGI applications with Django's paths
    re_path("", nowhere),  # type: ignore[arg-type]
]
