"""The web site: settings, pages, and the forms that follow from the engine's catalogue."""
