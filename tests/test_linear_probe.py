"""The linear protocol: what it learns, what it leaves alone, and at which rates."""

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import EvalPrediction, TrainerCallback

from modeling_moco import MoCoConfig, MoCoForImageClassification
from training.augment import EvaluationView
from training.data import DataArguments, ImageSplits
from training.linear_probe import LinearProbeArguments, LinearProbeTrainer, build_trainer, logistic_top1, top_accuracies

NAMES = ["red", "blue"]


@pytest.fixture(scope="module")
def splits():
    """Reddish and bluish noise, which even a random encoder keeps apart."""
    rng = np.random.default_rng(0)
    images, labels = [], []
    for i in range(32):
        pixels = rng.integers(0, 80, (24, 24, 3))
        pixels[..., 0 if i % 2 == 0 else 2] += 150
        images.append(Image.fromarray(pixels.astype(np.uint8)))
        labels.append(i % 2)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    rows = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
    rows = rows.cast_column("image", datasets.Image(decode=False))
    return ImageSplits(rows.select(range(24)), rows.select(range(24, 32)), NAMES)


def build(splits, folder, callbacks=(), **kwargs) -> LinearProbeTrainer:
    torch.manual_seed(0)
    model = MoCoForImageClassification(MoCoConfig(architecture="test_resnet", id2label=dict(enumerate(NAMES))))
    args = LinearProbeArguments(
        output_dir=str(folder),
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=1,
        **{"save_strategy": "no", "global_batch_size": 8, "num_train_epochs": 5, "lr_milestones": [3, 4]} | kwargs,
    )
    trainer = build_trainer(model, args, DataArguments(image_size=24, eval_resize=24), splits)
    for callback in callbacks:
        trainer.add_callback(callback)
    return trainer


class Watch(TrainerCallback):
    def __init__(self):
        self.rates, self.modes = [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.rates += [group["lr"] for group in optimizer.param_groups if group["params"]]
        self.modes.append(any(module.training for module in model.moco.modules()))


def test_it_learns_what_a_linear_classifier_can_and_changes_only_the_head(splits, tmp_path):
    trainer = build(splits, tmp_path)
    encoder = {name: tensor.clone() for name, tensor in trainer.model.moco.state_dict().items()}
    head = trainer.model.classifier.weight.detach().clone()
    trainer.train()
    assert trainer.evaluate()["eval_top1"] == 100
    assert logistic_top1(trainer, EvaluationView(24, 24)) == 100
    assert not torch.equal(trainer.model.classifier.weight, head)
    for name, tensor in trainer.model.moco.state_dict().items():
        assert torch.equal(tensor, encoder[name]), name


def test_the_encoder_stays_in_evaluation_mode_and_the_rate_drops_at_the_milestones(splits, tmp_path):
    watch = Watch()
    build(splits, tmp_path, [watch]).train()
    assert watch.rates == pytest.approx([30.0] * 9 + [3.0] * 3 + [0.3] * 3)
    assert not any(watch.modes)


def test_a_changed_statistic_of_the_encoder_is_an_error(splits, tmp_path):
    class Meddle(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            model.moco.encoder_q.bn1.num_batches_tracked += 1

    with pytest.raises(RuntimeError, match=r"bn1\.num_batches_tracked"):
        build(splits, tmp_path, [Meddle()], num_train_epochs=1).train()


def test_the_defaults_are_the_published_settings(tmp_path):
    args = LinearProbeArguments(output_dir=str(tmp_path), use_cpu=True)
    published = (30.0, 0.0, 100, [60, 80], 256, "sgd", "momentum=0.9")
    ours = (args.learning_rate, args.weight_decay, args.num_train_epochs, args.lr_milestones)
    assert (*ours, args.images_per_step, args.optim.value, args.optim_args) == published


def test_top_accuracies_count_the_label_among_the_best_five():
    logits = np.eye(7)[[0, 1, 2, 3]] * 9 - np.arange(7)  # the label first, else in the order 0, 1, 2, ...
    labels = np.array([0, 1, 6, 4])
    assert top_accuracies(EvalPrediction(logits, labels)) == pytest.approx({"top1": 50.0, "top5": 75.0})


def test_a_resumed_probe_ends_with_the_classifier_of_an_uninterrupted_one(splits, tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 4  # within the second epoch of three steps

    saving = {"save_strategy": "steps", "save_steps": 1, "num_train_epochs": 3}
    whole = build(splits, tmp_path / "whole", **saving)
    whole.train()
    build(splits, tmp_path / "parts", [Stop()], **saving).train()
    resumed = build(splits, tmp_path / "parts", **saving)
    resumed.train(resume_from_checkpoint=True)
    assert whole.train_dataset._epoch == resumed.train_dataset._epoch == 2  # crops of their own in every epoch
    for name, tensor in whole.model.classifier.state_dict().items():
        assert torch.equal(tensor, resumed.model.classifier.state_dict()[name]), name
