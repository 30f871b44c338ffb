"""What all tests of the planner start from."""

import pytest


@pytest.fixture(autouse=True)
def no_terminal(monkeypatch):
    """Text is not cut to the width of whoever runs the tests."""
    monkeypatch.delenv("COLUMNS", raising=False)
