"""The REST API: the same rules, sentences and permissions as the pages, for programs."""

from jobs.api.urls import api

__all__ = ["api"]
