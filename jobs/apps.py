"""The app that remembers jobs."""

from django.apps import AppConfig


class JobsConfig(AppConfig):
    """Jobs, their events, data sets, models and results."""

    name = "jobs"
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        from jobs import checks  # noqa: F401  registers the system checks
