"""Attributes of other libraries that have another value for a while."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """
    Give an attribute another value for a while.

    :param owner: a module or a class
    :param name: the attribute
    :param value: its value within the ``with`` block
    """
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextmanager
def replaced_all(owner: Any, values: Mapping[str, Any]) -> Iterator[None]:
    """
    Give several attributes other values for a while.

    :param owner: a module or a class
    :param values: by the names of the attributes
    """
    with ExitStack() as stack:
        for name, value in values.items():
            stack.enter_context(replaced(owner, name, value))
        yield
