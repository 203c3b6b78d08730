"""Settings of every test."""

import importlib.util
from pathlib import Path
from types import ModuleType

import datasets
import pytest
import torch

ROOT = Path(__file__).parents[1]

# The models are tiny: threads cost more than they save, and results do not depend on the number of cores.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def script():
    """A script of the project as a module: `script("pretrain").main([...])`."""

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"script_{name}", ROOT / "scripts" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    """No network, and nothing written to or read from the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
