"""The Hub on this machine."""

import pytest
from hub_server import TOKEN, Hub
from huggingface_hub import constants


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub with nothing in it, which this process takes for the true one, and a token that may write."""
    hub = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield hub
    hub.close()
