"""A run that the tests of publishing share."""

import pytest
from tiny_trainer import TINY


@pytest.fixture(scope="session")
def run(script, tmp_path_factory):
    """A pretraining run, the probe and the fine-tuning that followed it, with all that they leave."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    script("pretrain").main([*TINY, "--num_train_epochs", "2", "--output_dir", str(folder)])
    short = ["--use_cpu", "--num_train_epochs", "1", "--disable_tqdm", "True"]
    script("linear_probe").main([str(folder), *short])
    script("finetune").main([str(folder), *short, "--label_fraction", "1", "--global_batch_size", "16"])
    return folder
