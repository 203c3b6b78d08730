"""Every method's way through the commands: trained, classified, published, loaded and begun with."""

import pytest
import torch
from tiny_trainer import TINY
from transformers import AutoModel

from modeling_moco import MoCoModel
from training.hub.publish import PublishArguments, load_published, publish

FLAGS = {
    "bank": ["--dictionary", "bank", "--key_encoder", "none", "--bank_start", "encode"],
    "end_to_end": ["--dictionary", "batch", "--key_encoder", "shared"],
    "simclr": [
        *("--dictionary", "batch_both_views", "--key_encoder", "none", "--symmetric_loss", "True"),
        *("--projection_head", "simclr", "--augmentation", "simclr_cifar"),
        *("--optim", "lars", "--optim_args", "momentum=0.9,classic=true"),
    ],
    "moco_v3": [
        *("--dictionary", "batch", "--symmetric_loss", "True", "--projection_head", "mlp_bn", "--augmentation", "v3"),
        *("--prediction_head", "mlp_bn", "--key_momentum_schedule", "cosine", "--loss_scale", "0.4"),
    ],
}
ANNOUNCED = {
    "bank": ["64 images in one view of 32 px", "K 64, T 0.2", "bank: 64 keys, 0 MB in memory", "far above chance"],
    "end_to_end": ["15 negatives of the batch, T 0.2", "near log(1+K) = 2.77", "6.2 % by chance"],
    "simclr": ["30 negatives of the batch", "near 2 log(1+K) = 6.87", "lars momentum=0.9,classic=true"],
    "moco_v3": ["15 negatives of the batch, m 0.99 to 1, T 0.2", "near 0.8 log(1+K) = 2.22"],
}
CARD = {
    "bank": ("by a memory bank ([arXiv:1805.01978]", "The projector is there, the bank of the training images is not"),
    "end_to_end": ("by the end-to-end dictionary of MoCo v1 ([arXiv:1911.05722]", "The projector is there: training"),
    "simclr": ("by SimCLR ([arXiv:2002.05709]", "The projector is there: training"),
    "moco_v3": ("by MoCo v3 ([arXiv:2104.02057]", "Key encoder, projector and predictor are there: training"),
}


@pytest.mark.slow
@pytest.mark.parametrize("method", FLAGS)
def test_a_run_of_a_method_is_announced_classified_published_and_begun_with(method, script, tmp_path, capsys):
    run = tmp_path / "run"
    flags = [*TINY, *FLAGS[method], "--batch_norm", "plain", "--num_train_epochs", "1"]
    script("pretrain").main([*flags, "--output_dir", str(run)])
    said = capsys.readouterr().out
    assert all(words in said for words in ANNOUNCED[method]), said
    short = ["--use_cpu", "--num_train_epochs", "1", "--disable_tqdm", "True"]
    script("linear_probe").main([str(run), *short])
    assert (run / "report.html").is_file()

    model, processor = load_published(str(run), training_state=True)
    args = PublishArguments(include_training_state=True)
    (folder := tmp_path / "published").mkdir()
    publish(str(run), model, processor, "org/model", args, folder)
    card = (folder / "README.md").read_text()
    assert all(words in card for words in CARD[method]), card
    trained = MoCoModel.from_pretrained(run)
    again = MoCoModel.from_pretrained(folder)
    for name, tensor in trained.state_dict().items():
        if not name.startswith("dictionary.bank"):
            assert torch.equal(tensor, again.state_dict()[name]), name
    if method == "bank":
        assert again.dictionary.bank.shape == (1, 128)
    remote = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(remote(x).pooler_output, trained.eval()(x).pooler_output)

    script("pretrain").main([*flags, "--init_from", str(folder), "--output_dir", str(tmp_path / "next")])
    said = capsys.readouterr().out
    assert ("begins with keys of training images" in said) == (method == "bank")
    assert "is new" not in said.replace("the bank is new", "")
