#!/usr/bin/env python
"""The command line of the studio: `manage.py up` runs everything, `manage.py help` lists the rest."""

import os
import sys


def main() -> None:
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "studio.settings")
    try:
        from django.core.management import execute_from_command_line
    except ModuleNotFoundError:
        sys.exit(
            "Django is not installed in this Python. Run `make start`, which makes the environment and starts the studio in it."
        )
    execute_from_command_line(sys.argv)


if __name__ == "__main__":
    main()
