"""A run that begins with weights from a Hub: MoCo's with its queue, timm's, and what the card says of them."""

import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from hub_server import Hub, environment
from huggingface_hub import HfApi, ModelCard
from timm.models import save_for_hf

from modeling_moco import MoCoModel

ROOT = Path(__file__).parents[2]
TINY = [
    *("--dataset_name", "digits", "--max_train_samples", "64", "--max_eval_samples", "16", "--image_size", "32"),
    *("--eval_resize", "32", "--queue_size", "64", "--global_batch_size", "16", "--knn_k", "5", "--use_cpu"),
    *("--dataloader_num_workers", "0", "--dataloader_persistent_workers", "False", "--disable_tqdm", "True"),
    *("--max_steps", "1", "--learning_rate", "0"),
]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:httpx")


def pretrain(hub: Hub, home: Path, *flags: str) -> str:
    """What `scripts/pretrain.py` prints, which takes the Hub for the true one."""
    command = [sys.executable, str(ROOT / "scripts/pretrain.py"), *TINY, *flags]
    env = environment(hub, home) | {"PYTHONWARNINGS": "default"}  # the client's own use of httpx warns
    result = subprocess.run(command, capture_output=True, text=True, env=env)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow  # the parts are tested apart: folders, formats, what is published
def test_a_run_begins_with_what_another_has_published(hub, script, tmp_path):
    script("pretrain").main([*TINY, "--output_dir", str(tmp_path / "first")])
    first = MoCoModel.from_pretrained(tmp_path / "first")
    script("push_to_hub").main([str(tmp_path / "first"), "org/first", "--include_training_state"])
    flags = ["--output_dir", str(tmp_path / "second"), "--init_from", "org/first"]
    said = pretrain(hub, tmp_path / "home", *flags)
    assert "start: from org/first (MoCo v2, test_resnet, K 64, dim 128)\n  reading" in said
    second = MoCoModel.from_pretrained(tmp_path / "second")
    for name, tensor in second.named_parameters():  # the learning rate is zero
        torch.testing.assert_close(tensor, first.get_parameter(name), msg=name)
    new = slice(16, 32)  # of the second run's step
    kept = [column for column in range(64) if column not in range(new.start, new.stop)]
    assert torch.equal(second.dictionary.queue[:, kept], first.dictionary.queue[:, kept])
    assert not torch.equal(second.dictionary.queue[:, new], first.dictionary.queue[:, new])

    script("push_to_hub").main([str(tmp_path / "second"), "org/second"])
    card = ModelCard(hub.files("org/second")["README.md"].decode())
    assert card.data.base_model == "org/first"
    assert "The pretraining began with the weights of org/first." in card.text


@pytest.mark.slow
def test_the_card_of_a_run_that_a_folder_began_names_no_place(hub, script, tmp_path):
    script("pretrain").main([*TINY, "--output_dir", str(tmp_path / "first")])
    folder = ["--init_from", str(tmp_path / "first"), "--output_dir", str(tmp_path / "third")]
    script("pretrain").main([*TINY, *folder])
    script("push_to_hub").main([str(tmp_path / "third"), "org/third"])
    card = ModelCard(hub.files("org/third")["README.md"].decode())
    assert card.data.base_model is None
    assert "The pretraining began with the weights of first." in card.text
    assert str(tmp_path) not in card.content


@pytest.mark.slow  # tests/convert/test_start.py reads the same from a folder
def test_a_run_begins_with_timms_weights(hub, tmp_path):
    torch.manual_seed(2)
    pretrained = timm.create_model("test_resnet", num_classes=10)
    save_for_hf(pretrained, tmp_path / "timm", safe_serialization=True)
    hub.create("timm/test_resnet.r160_in1k")
    HfApi(endpoint=hub.url).upload_folder(repo_id="timm/test_resnet.r160_in1k", folder_path=tmp_path / "timm")
    name = "hf-hub:timm/test_resnet.r160_in1k"
    said = pretrain(hub, tmp_path / "home", "--output_dir", str(tmp_path / "run"), "--init_from", name)
    assert (
        f"start: from {name} (timm, test_resnet)\n         - left out: encoder_q.fc.bias, encoder_q.fc.weight\n" in said
    )
    model = MoCoModel.from_pretrained(tmp_path / "run")
    for key, tensor in model.encoder_q.named_parameters():
        assert torch.equal(tensor, pretrained.get_parameter(key)), key
    assert list(model.config.image_mean) == list(pretrained.pretrained_cfg["mean"])
