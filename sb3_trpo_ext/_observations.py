"""Observations and their spaces, which are dicts or not."""

from collections.abc import Callable
from typing import Any

from gymnasium import spaces


def mapped(function: Callable[[Any], Any], observations: Any) -> Any:
    """Apply a function to observations, to each part of them if they are a dict."""
    if isinstance(observations, dict):
        return {key: function(value) for key, value in observations.items()}
    return function(observations)


def parts_of(value: Any) -> dict[str, Any]:
    """The parts of a Dict observation or Dict space by key; anything else under an empty key."""
    if isinstance(value, spaces.Dict):
        return value.spaces
    return value if isinstance(value, dict) else {"": value}
