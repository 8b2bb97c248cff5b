"""Where websockets arrive."""

from django.urls import path, re_path

from jobs.consumers import JobConsumer, Nowhere

websocket_urlpatterns = [
    path("ws/jobs/<uuid:job_id>/", JobConsumer.as_asgi()),
    re_path("", Nowhere.as_asgi()),
]
