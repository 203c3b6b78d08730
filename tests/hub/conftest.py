"""A Hub on this machine."""

import pytest
from hub_server import TOKEN, Hub
from huggingface_hub import constants, hf_api


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub with nothing in it, which this process takes for the true one, and a token that may write."""
    hub = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(hf_api.api, "endpoint", hub.url)  # of the functions, made when they were imported
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield hub
    hub.close()
