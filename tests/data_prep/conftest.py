"""What several tests of data preparation share."""

import pytest

from data_prep import default_codec


@pytest.fixture
def quick_fit(monkeypatch):
    """The built-in codec is fitted in five steps: bad, but soon."""
    monkeypatch.setattr(default_codec, "STEPS", 5)
