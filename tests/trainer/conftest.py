"""Fixtures for trainer tests."""

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture
def warned() -> Iterator[list[str]]:
    """Warnings of transformers in this test; its loggers do not propagate to pytest's `caplog`."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("transformers").addHandler(handler)
    yield messages
    logging.getLogger("transformers").removeHandler(handler)
