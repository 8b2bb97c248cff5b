"""Common passwords are refused in Django's words, by a list that is read when it is asked."""

from __future__ import annotations

import pytest
from django.contrib.auth import password_validation
from django.core.exceptions import ValidationError

from studio.passwords import CommonPasswordValidator


@pytest.mark.parametrize(
    "password", ["password", " PassWord1 ", "dragon", "correct horse battery staple", "zq8-bonsai-leaf"]
)
def test_it_answers_as_djangos_does(password: str) -> None:
    said = []
    for validator in (CommonPasswordValidator(), password_validation.CommonPasswordValidator()):
        try:
            validator.validate(password)
            said.append("")
        except ValidationError as error:
            said.append(f"{error.code}: {error.message}")
    assert said[0] == said[1]


def test_the_settings_use_it_and_nothing_is_kept() -> None:
    validators = [
        one for one in password_validation.get_default_password_validators() if isinstance(one, CommonPasswordValidator)
    ]
    assert len(validators) == 1 and not hasattr(validators[0], "passwords")
    assert "commonly used" in " ".join(password_validation.password_validators_help_texts())
