"""Recipes as nested values, and what is said where one is refused."""

from __future__ import annotations

import pytest

from collm.errors import ConfigError
from collm.settings.load import parse_config


def refused(values):
    with pytest.raises(ConfigError) as caught:
        parse_config(values)
    message = str(caught.value)
    assert "Traceback" not in message
    assert "pydantic" not in message
    assert "Settings" not in message, f"an internal name shows: {message}"
    assert message.rstrip().endswith((".", "?")), message
    return message


def rooms(**settings):
    """algorithm__lam=1 -> {"env": ..., "algorithm": {"lam": 1}}"""
    values = {"env": {"name": "agree"}}
    for key, value in settings.items():
        room, _, name = key.partition("__")
        values.setdefault(room, {})[name] = value
    return values
