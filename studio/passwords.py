"""Django's list of common passwords, read when a password is chosen instead of kept by every process that shows the form."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

from django.contrib.auth import password_validation
from django.core.exceptions import ValidationError

LIST = Path(password_validation.__file__).with_name("common-passwords.txt.gz")


class CommonPasswordValidator(password_validation.CommonPasswordValidator):
    """The same answers and words as Django's."""

    def __init__(self) -> None:
        """Nothing is read yet."""

    def validate(self, password: str, user: Any = None) -> None:
        wanted = password.lower().strip()
        with gzip.open(LIST, "rt", encoding="utf-8") as lines:
            if any(line.strip() == wanted for line in lines):
                raise ValidationError(self.get_error_message(), code="password_too_common")
