"""What all tests of planning share."""

import pytest

from rf_train.model import routing


@pytest.fixture(autouse=True)
def no_size_is_small(monkeypatch):
    """Routing takes its fast path, which is what is planned for, at the tests' sizes, too."""
    monkeypatch.setattr(routing, "SMALL_PAIRS", 0)
