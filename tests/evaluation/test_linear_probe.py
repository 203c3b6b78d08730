"""The linear probe: what it learns, what it leaves alone, at which rates, and how it chooses between them."""

import json
import math
from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
import torch.distributed as dist
import yaml
from PIL import Image
from ranks import join_trainers, run_ranks
from sklearn.metrics import confusion_matrix, recall_score
from transformers import TrainerCallback

from modeling_moco import MoCoConfig, MoCoForImageClassification, MoCoModel
from training.data.sources import DataArguments, ImageSplits
from training.engine.checkpoints import claim_output_dir
from training.engine.results import encoder_digest, interval, read_results
from training.evaluation.encoder import Encoder
from training.evaluation.linear_probe import (
    LinearProbeTrainer,
    ProbeRun,
    build_trainer,
    finish,
    parse_linear_probe,
    save_probe,
)
from training.evaluation.probe_arguments import LinearProbeArguments
from training.evaluation.probe_results import HeadReport, choose, hold_out

NAMES = ["red", "blue"]
DATA = DataArguments(image_size=24, eval_resize=24)

PLACE = {"dataset": "digits", "content": {}}


def coloured_rows(count: int, noise: int = 80, seed: int = 0) -> datasets.Dataset:
    """Reddish and bluish noise, in turns."""
    rng = np.random.default_rng(seed)
    images, labels = [], []
    for i in range(count):
        pixels = rng.integers(0, noise, (24, 24, 3))
        pixels[..., 0 if i % 2 == 0 else 2] += 255 - noise
        images.append(Image.fromarray(pixels.astype(np.uint8)))
        labels.append(i % 2)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    rows = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
    return rows.cast_column("image", datasets.Image(decode=False))


@pytest.fixture(scope="module")
def splits():
    """Images that even a random encoder keeps apart."""
    rows = coloured_rows(32)
    return ImageSplits(rows.select(range(24)), rows.select(range(24, 32)), NAMES)


def classifier() -> MoCoForImageClassification:
    torch.manual_seed(0)
    config = MoCoConfig(architecture="test_resnet", id2label=dict(enumerate(NAMES)))
    return MoCoForImageClassification(config).eval()


def build(splits, folder, callbacks=(), model=None, **kwargs) -> LinearProbeTrainer:
    args = LinearProbeArguments(
        output_dir=str(folder),
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=1,
        **{"save_strategy": "no", "global_batch_size": 8, "num_train_epochs": 5, "lr_milestones": [3, 4]} | kwargs,
    )
    trainer = build_trainer(model or classifier(), args, DATA, splits)
    for callback in callbacks:
        trainer.add_callback(callback)
    return trainer


class Watch(TrainerCallback):
    def __init__(self):
        self.rates, self.modes = [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.rates.append([group["lr"] for group in optimizer.param_groups])
        self.modes.append(any(module.training for module in model.moco.modules()))


def head_state(trainer, i=0) -> dict[str, torch.Tensor]:
    return trainer.model.heads[i].state_dict()


def assert_equal(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], **tolerance) -> None:
    for name, tensor in expected.items():
        torch.testing.assert_close(ours[name], tensor, **{"rtol": 0, "atol": 0} | tolerance)


# The official protocol


def test_it_learns_what_a_linear_classifier_can_and_changes_only_the_head(splits, tmp_path):
    trainer = build(splits, tmp_path)
    encoder = {name: tensor.clone() for name, tensor in trainer.model.moco.state_dict().items()}
    start = {name: tensor.clone() for name, tensor in head_state(trainer).items()}
    trainer.train()
    assert trainer.evaluate()["eval_top1"] == 100
    assert not torch.equal(head_state(trainer)["weight"], start["weight"])
    assert start["weight"].std() == pytest.approx(0.01, rel=0.2)
    assert not start["bias"].any()
    assert_equal(trainer.model.moco.state_dict(), encoder)


def test_the_encoder_stays_in_evaluation_mode_and_every_rate_drops_at_the_milestones(splits, tmp_path):
    watch = Watch()
    build(splits, tmp_path, [watch], learning_rates=[30, 1]).train()  # 22 images: three steps an epoch
    expected = [[30.0, 1.0]] * 9 + [[3.0, 0.1]] * 3 + [[0.3, 0.01]] * 3
    np.testing.assert_allclose(watch.rates, expected)
    assert not any(watch.modes)


@pytest.mark.parametrize("changed", ["encoder_q.conv1.0.weight", "encoder_q.bn1.num_batches_tracked", "shift"])
def test_a_changed_weight_or_statistic_of_the_encoder_is_an_error(splits, tmp_path, changed):
    class Meddle(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            tensors = dict(model.moco.named_parameters()) | dict(model.moco.named_buffers())
            tensors[changed].data += 1

    model = classifier()
    model.moco.register_buffer("shift", torch.zeros(1), persistent=False)  # not in the state_dict, as Swin's index
    with pytest.raises(RuntimeError, match=changed.replace(".", r"\.")):
        build(splits, tmp_path, [Meddle()], model, num_train_epochs=1).train()


def test_the_defaults_are_the_published_settings(tmp_path):
    args = LinearProbeArguments(output_dir=str(tmp_path), use_cpu=True)
    published = ("official", [30.0], 0.0, 100, [60, 80], 256, "sgd", "momentum=0.9")
    ours = (args.mode, args.rates, args.weight_decay, args.num_train_epochs, args.lr_milestones)
    assert (*ours, args.global_batch_size, args.optim.value, args.optim_args) == published


V3 = {"num_train_epochs": 90, "global_batch_size": 1024, "learning_rate_scaling": "linear", "lr_milestones": None}


@pytest.mark.parametrize(("rate", "scaled"), [(0.1, 0.4), (3.0, 12.0)], ids=["r50", "vit"])
def test_the_protocol_of_moco_v3_can_be_said_by_flags_and_in_a_recipe(saved, tmp_path, rate, scaled):
    # facebookresearch/moco-v3, main_lincls.py and README.md: SGD with momentum 0.9, no weight decay, a cosine in whole epochs.
    flags = ["--num_train_epochs", "90", "--global_batch_size", "1024", "--learning_rate", str(rate), "--lr_milestones"]
    by_flags = parse_linear_probe([*saved, *flags, "--learning_rate_scaling", "linear"])
    recipe = {"data": {"dataset_name": "digits"}, "model": {}, "probe": V3 | {"learning_rate": rate}}
    (tmp_path / "model" / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    by_recipe = parse_linear_probe(saved)
    for args in (by_flags.training, by_recipe.training):
        assert (args.rates, args.weight_decay, args.optim.value) == ([pytest.approx(scaled)], 0, "sgd")
        assert args.optim_args == "momentum=0.9"
        words = f"learning rate {rate:g} x 1024/256 = {scaled:g}, 90 epochs, cosine, batch 1024"
        assert args.protocol == words
    cached = parse_linear_probe([*saved, "--mode", "cached", "--learning_rates", "0.1", "1"]).training
    assert cached.rates == [0.1, 1.0]
    assert cached.protocol == "learning rate 0.1 1 by a held-out tenth, 90 epochs, cosine, batch 1024"


def test_scaled_rates_follow_the_cosine_of_moco_v3_in_whole_epochs(splits, tmp_path):
    watch = Watch()
    settings = V3 | {"num_train_epochs": 4, "global_batch_size": 8, "learning_rates": [3.2, 96]}
    build(splits, tmp_path, [watch], **settings).train()
    # adjust_learning_rate of main_lincls.py, 22 images: three steps an epoch
    factors = [0.5 * (1 + math.cos(math.pi * epoch / 4)) for epoch in range(4) for _ in range(3)]
    np.testing.assert_allclose(watch.rates, [[3.2 * 8 / 256 * x, 96 * 8 / 256 * x] for x in factors], rtol=1e-12)


def test_a_resumed_probe_ends_with_the_heads_and_history_of_an_uninterrupted_one(splits, tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 4  # within the second epoch of three steps

    saving = {"save_strategy": "steps", "save_steps": 1, "num_train_epochs": 3, "learning_rates": [30, 0.1, 3]}
    whole = build(splits, tmp_path / "whole", **saving)
    whole.train()
    build(splits, tmp_path / "parts", [Stop()], **saving).train()
    resumed = build(splits, tmp_path / "parts", **saving)
    resumed.train(resume_from_checkpoint=True)
    assert whole.train_dataset._epoch == resumed.train_dataset._epoch == 2  # crops of their own in every epoch
    for i in range(3):
        assert_equal(head_state(resumed, i), head_state(whole, i))
    assert not torch.equal(head_state(whole, 0)["weight"], head_state(whole, 1)["weight"])
    (ours, _), (expected, _) = resumed.probe(), whole.probe()
    assert ours.heads == expected.heads


# Several rates


def test_a_head_among_many_is_the_head_trained_alone(splits, tmp_path):
    rates = [30.0, 0.1, 3.0]
    together = build(splits, tmp_path, learning_rates=rates)
    together.train()
    kept, _ = hold_out(torch.tensor(splits.train["label"][:]), seed=0)
    rest = ImageSplits(splits.train.select(kept.tolist()), splits.eval, NAMES)
    for i, rate in enumerate(rates):
        alone = build(rest, tmp_path, learning_rate=rate)
        alone.train()
        assert_equal(head_state(together, i), head_state(alone))


def test_the_held_out_part_chooses_and_not_the_evaluated_images(splits, tmp_path):
    # The evaluated images have each other's labels: what has learnt most is worst there.
    swapped = splits.eval.map(lambda row: {"label": 1 - row["label"]})
    trainer = build(ImageSplits(splits.train, swapped, NAMES), tmp_path, learning_rates=[1e-9, 30])
    trainer.train()
    probe, chosen = trainer.probe()
    idle, trained = probe.heads
    assert (trained.held_out, trained.last) == (100, 0)
    assert idle.last > 0
    assert chosen == 1
    assert probe.final == trained
    assert probe.scores.top1 == 0
    assert trainer.evaluate()["eval_top1"] == 0
    trained_on = {bytes(row["image"]["bytes"]) for row in trainer.train_dataset.source}
    held_out = {bytes(row["image"]["bytes"]) for row in trainer.held_out.source}
    assert len(trained_on) == probe.trained_on == 22
    assert len(held_out) == 2
    assert not trained_on & held_out


def test_a_probe_that_was_evaluated_at_its_end_alone_has_no_best_epoch(splits, tmp_path):
    trainer = build(splits, tmp_path, eval_strategy="no", num_train_epochs=2, lr_milestones=None)
    trainer.train()
    probe, _ = trainer.probe()
    assert (probe.final.best, probe.final.best_epoch) == (None, None)
    assert [result.protocol for result in probe.results(0)] == [probe.protocol]
    evaluated = build(splits, tmp_path / "b", num_train_epochs=1.5, lr_milestones=None)
    evaluated.train()
    assert evaluated.probe()[0].final.best_epoch in (1, 1 + 2 / 3)


def test_the_best_epoch_is_reported_beside_the_last_one(splits, tmp_path):
    trainer = build(splits, tmp_path, learning_rates=[3, 30], num_train_epochs=3)
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "eval_top1_rate_3" in entry]
    assert [entry["epoch"] for entry in history] == [1, 2, 3]
    history[1]["eval_top1_rate_3"] = 101.0
    probe, _ = trainer.probe()
    head = probe.heads[0]
    assert (head.setting, head.best, head.best_epoch) == ("learning rate 3", 101.0, 2)
    assert head.last == trainer.scores()[0].top1 == history[2]["eval_top1_rate_3"]


@pytest.mark.parametrize(
    ("held_out", "chosen"),
    [
        ([90.0, 95.0, 80.0], 1),
        ([100.0] * 7, 3),
        ([100.0, 100.0, 90.0], 0),
        ([80.0, 100.0, 90.0, 100.0, 100.0], 3),
        ([None], 0),
    ],
)
def test_of_equals_the_middle_one_is_chosen(held_out, chosen):
    assert choose([HeadReport(f"learning rate {i}", value, 0.0) for i, value in enumerate(held_out)]) == chosen


def test_a_tenth_of_every_class_is_held_out():
    labels = torch.tensor([0] * 50 + [1] * 25 + [2] * 2 + [3])[torch.randperm(78)]
    kept, held = hold_out(labels, seed=0)
    assert sorted(torch.cat([kept, held]).tolist()) == list(range(78))
    assert labels[held].bincount(minlength=4).tolist() == [5, 2, 1, 0]
    assert all(part.tolist() == sorted(part.tolist()) for part in (kept, held))
    assert torch.equal(hold_out(labels, seed=0)[1], held)
    assert not torch.equal(hold_out(labels, seed=1)[1], held)
    for useless, said in (
        (torch.arange(3), "3 images of 3 classes"),
        (torch.ones(4, dtype=torch.long), "4 images of 1"),
    ):
        with pytest.raises(ValueError, match=said):
            hold_out(useless, seed=0)


def _rank(rank: int, folder: str) -> None:
    join_trainers(rank, folder, 2)
    rows = coloured_rows(32)
    splits = ImageSplits(rows.select(range(26)), rows.select(range(26, 32)), NAMES)
    trainer = build(splits, f"{folder}/run", learning_rates=[30, 1], num_train_epochs=2)
    trainer.train()
    torch.save([trainer.model.heads.state_dict(), trainer.probe()[0].heads], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_train_the_heads_of_one(tmp_path):
    run_ranks(_rank, (str(tmp_path),), 2)
    rows = coloured_rows(32)
    alone = build(
        ImageSplits(rows.select(range(26)), rows.select(range(26, 32)), NAMES),
        tmp_path / "alone",
        learning_rates=[30, 1],
        num_train_epochs=2,
    )
    alone.train()
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2))
    assert_equal(first[0], second[0])
    assert first[1] == second[1] == alone.probe()[0].heads
    assert_equal(first[0], alone.model.heads.state_dict(), atol=1e-4, rtol=1e-4)


# What is left behind


def test_results_say_where_crops_are_not_flipped(splits, tmp_path):
    args = LinearProbeArguments(output_dir=str(tmp_path), use_cpu=True)
    words = [
        build_trainer(classifier(), args, replace(DATA, horizontal_flip=flip), splits).protocol
        for flip in (True, False)
    ]
    assert words[1] == f"{words[0]}, no flips"


def test_the_saved_model_gives_the_reported_numbers(splits, tmp_path):
    noisy = coloured_rows(40, noise=205, seed=1)
    splits = ImageSplits(coloured_rows(24, noise=205), noisy, NAMES, {"dataset": "colours", "split": "test"})
    model = classifier()
    trainer = build(splits, tmp_path / "probe", model=model, learning_rates=[1e-9, 3, 30])
    trainer.train()
    probe = finish(trainer, model)
    run = ProbeRun(Encoder(str(tmp_path)), DATA, trainer.args, {})
    save_probe(probe, run, splits, model.moco)

    saved = MoCoForImageClassification.from_pretrained(tmp_path / "probe").eval()
    pixels = torch.stack([trainer.eval_dataset[i]["pixel_values"] for i in range(40)])
    with torch.no_grad():
        called = saved(pixels).logits.argmax(dim=1).numpy()
    truth = np.array(noisy["label"][:])
    (entry,) = json.loads((tmp_path / "probe" / "metrics.json").read_text())["probes"]
    assert 50 < entry["top1"] < 100  # neither trivial nor hopeless
    assert entry["top1"] == pytest.approx(100 * (called == truth).mean())
    assert "top5" not in entry  # with two classes every answer is among the first five
    matrix = confusion_matrix(truth, called)
    assert entry["confusion"] == [[i, j, matrix[i, j]] for i in range(2) for j in range(2) if matrix[i, j]]
    recalls = 100 * recall_score(truth, called, average=None)
    assert [row["class"] for row in entry["per_class"]] == NAMES
    assert [row["top1"] for row in entry["per_class"]] == pytest.approx(list(recalls))
    assert entry["interval"] == pytest.approx(interval(entry["top1"], 40))
    assert [head["setting"] for head in entry["heads"]] == [
        "learning rate 1e-09",
        "learning rate 3",
        "learning rate 30",
    ]

    low, high = interval(entry["top1"], 40)
    assert f"chosen: {probe.final.setting}" in probe.table()
    assert f"{low:.2f} to {high:.2f}" in probe.table()
    results = read_results(tmp_path)
    words = "linear probe, official, learning rate 1e-09 3 30 by a held-out tenth, 5 epochs, a tenth at 3 4, batch 8"
    assert [(r["protocol"], r["metric"]) for r in results[:1]] == [(words, "top1")]
    assert results[1]["protocol"] == f"{words}, best epoch on the evaluated images"
    assert results[0]["value"] == entry["top1"] <= results[1]["value"]
    assert results[0]["settings"] == {"chosen": probe.final.setting, "trained_on": 22}
    assert results[0]["model"] == encoder_digest(model.moco) == encoder_digest(saved.moco)

    save_probe(probe, run, splits, model.moco)
    assert len(json.loads((tmp_path / "probe" / "metrics.json").read_text())["probes"]) == 1
    assert len(read_results(tmp_path)) == 2


# Bad input


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rates": [1, 0]}, r"learning_rates \(1 0\) must be above 0"),
        ({"learning_rates": [1, float("nan")]}, r"learning_rates \(1 nan\) must be above 0"),
        ({"learning_rates": []}, r"learning_rates \(\) must be above 0"),
        ({"learning_rates": [3, 1, 3]}, r"learning_rates \(3 1 3\) has a learning rate twice"),
        ({"learning_rate": -1}, r"learning_rate \(-1\) must be above 0"),
    ],
)
def test_bad_rates_are_refused_by_name(values, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        LinearProbeArguments(output_dir=str(tmp_path), use_cpu=True, **values)


@pytest.fixture
def saved(tmp_path):
    MoCoModel(MoCoConfig(architecture="test_resnet", queue_size=16)).save_pretrained(tmp_path / "model")
    return [str(tmp_path / "model"), "--dataset_name", "digits", "--image_size", "32", "--use_cpu"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--mode", "cached", "--bf16", "True", "--learning_rate", "3"],
            "bf16, learning_rate means nothing in the cached",
        ),
        (["--learning_rate", "3", "--learning_rates", "1", "3"], r"learning_rate \(3\) and learning_rates \(1 3\)"),
        (["--learning_rates"], "expected at least one argument"),
        (["--lr_scheduler_type", "cosine"], r"lr_scheduler_type has no effect beside lr_milestones \(60 80\)"),
        (["--lr_scheduler_type", "linear"], r"\(linear\) and lr_milestones \(60 80\) are two schedules"),
        (["--mode", "chached"], "invalid choice: 'chached'"),
        (
            ["--mode", "cached", "--num_train_epochs", "1.5"],
            r"num_train_epochs \(1.5\) must be whole in the cached mode",
        ),
        (["--gradient_checkpointing", "true"], "flag --gradient_checkpointing is unknown"),
    ],
)
def test_flags_that_contradict_are_refused(saved, flags, message):
    with pytest.raises(ValueError, match=message):
        parse_linear_probe([*saved, *flags])


def test_each_mode_has_a_folder_and_does_not_enter_another_runs(saved, tmp_path):
    official, cached = (parse_linear_probe([*saved, *flags]) for flags in ([], ["--mode", "cached"]))
    assert official.training.output_dir == str(tmp_path / "model" / "linear_probe")
    assert cached.training.output_dir == str(tmp_path / "model" / "linear_probe_cached")
    assert official.training.rates == [30]
    assert len(cached.training.rates) > 3
    folder = tmp_path / "mine"
    rates = parse_linear_probe([*saved, "--learning_rates", "1", "3"])
    assert rates.training.output_dir == str(tmp_path / "model" / "linear_probe_rates")
    rates = parse_linear_probe([*saved, "--learning_rates", "1", "3", "--output_dir", str(folder)])
    claim_output_dir(rates.training, None, rates.settings, rates.defaults, {}, PLACE)
    (folder / "metrics.json").write_text("{}")
    assert claim_output_dir(rates.training, None, rates.settings, rates.defaults, {}, PLACE) is None
    for flags, key in ((["--mode", "cached"], "mode"), (["--learning_rates", "1"], "learning_rates")):
        other = parse_linear_probe([*saved, "--learning_rates", "1", "3", *flags, "--output_dir", str(folder)])
        with pytest.raises(ValueError, match=f"already holds another run: {key} is"):
            claim_output_dir(other.training, None, other.settings, other.defaults, {}, PLACE)
