"""The app that draws the pages."""

from django.apps import AppConfig


class PagesConfig(AppConfig):
    """Pages, their forms and their template tags."""

    name = "studio.pages"
    label = "pages"
