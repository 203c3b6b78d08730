"""Settings of every test, and the model that several files share."""

import importlib.util
from pathlib import Path
from types import ModuleType

import datasets
import pytest
import torch
from tiny_models import moco_config, views

from modeling_moco import MoCoModel

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


@pytest.fixture(scope="session", autouse=True)
def _strict_processes():
    """Warnings are errors in every process that a test starts, spawned ranks and scripts alike: pytest's filters end here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONWARNINGS", "error,ignore:This DataLoader will create")
        patch.setenv("OMP_NUM_THREADS", "1")  # for the reason above; accelerate warns where it has to choose itself
        yield


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    """No network, and nothing written to or read from the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


@pytest.fixture(scope="module")
def trained():
    """A model whose every tensor differs from its initial value, with the pointer inside the queue."""
    torch.manual_seed(1)
    model = MoCoModel(moco_config())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    for _ in range(5):
        model.dictionary.enqueue(model(*views()).key_embeds)
    return model.eval()
