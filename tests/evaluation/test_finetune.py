"""Fine-tuning: which labels it sees, what trains at which rate, and what it leaves behind."""

import json
import os
import signal
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import join_trainers, run_ranks
from tiny_models import save_encoder
from transformers import TrainerCallback, pipeline

from modeling_moco import MoCoForImageClassification, MoCoModel
from training.commands.evaluations import finetune
from training.data.formats import load_digits
from training.data.sources import ImageSplits, load_images
from training.engine.results import encoder_digest
from training.evaluation.encoder import Encoder
from training.evaluation.finetune import (
    FinetuneArguments,
    build_trainer,
    choose_labelled,
    draw_split,
    finish,
    parse_finetune,
    save_split,
)

TINY = [
    *("--dataset_name", "digits", "--max_train_samples", "120", "--max_eval_samples", "40", "--image_size", "32"),
    *("--eval_resize", "32", "--global_batch_size", "16", "--num_train_epochs", "2", "--use_cpu"),
    *("--logging_steps", "1", "--disable_tqdm", "True"),
]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("encoder") / "run")


def build(encoder, folder, *flags, callback=None):
    run = parse_finetune([str(encoder), *TINY, "--output_dir", str(folder), *flags])
    splits = load_images(run.data, labelled=True)
    trainer = build_trainer(run, splits, choose_labelled(splits, run.training))
    if callback is not None:
        trainer.add_callback(callback)
    return trainer


def copy_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def changed(module: torch.nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, tensor in module.state_dict().items() if not torch.equal(tensor, before[name])}


# Words


def many_classes(classes: int, each: int) -> datasets.Dataset:
    """Images of many classes, a few of each."""
    pixel = load_digits()["train"][0]["image"]
    labels = [i % classes for i in range(classes * each)]
    features = datasets.Features(
        {"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=[str(i) for i in range(classes)])}
    )
    return datasets.Dataset.from_dict({"image": [pixel] * len(labels), "label": labels}, features=features)


def test_it_is_measured_in_the_precision_of_its_files(encoder, tmp_path):
    folder = tmp_path / "run"
    run = parse_finetune([str(encoder), *TINY, "--output_dir", str(folder), "--bf16", "True"])
    splits = load_images(run.data, labelled=True)
    trainer = build_trainer(run, splits, choose_labelled(splits, run.training))
    trainer.train()
    batch = {"pixel_values": torch.stack([trainer.eval_dataset[i]["pixel_values"] for i in range(8)])}
    finish(run, trainer, splits)
    _, logits, _ = trainer.prediction_step(trainer.model, dict(batch), prediction_loss_only=False)
    with torch.no_grad():
        loaded = MoCoForImageClassification.from_pretrained(folder)(**batch).logits
    torch.testing.assert_close(logits, loaded, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("fraction", "each", "words"),
    [
        (1.0, 3, "100 % of the labels (90 images)"),
        (0.1, 1, "100 % of the labels (30 images)"),  # at least one of each class, which is all
        (0.1, 3, "33.3 % of the labels (30 images)"),
        (0.1, 10, "10 % of the labels (30 images)"),
        (0.1, 11, "10 % of the labels (30 images)".replace("10 %", "9.09 %")),
        (0.2, 10, "20 % of the labels (60 images)"),
    ],
)
def test_the_words_say_which_share_of_the_labels_was_used(encoder, tmp_path, fraction, each, words):
    run = parse_finetune([str(encoder), *TINY, "--output_dir", str(tmp_path), "--label_fraction", str(fraction)])
    rows = many_classes(30, each)
    splits = ImageSplits(rows, rows, rows.features["label"].names)
    trainer = build_trainer(run, splits, choose_labelled(splits, run.training))
    assert f"fine-tuning on {words}, 2 epochs" in run.protocol(trainer)


def test_another_schedule_or_optimizer_is_another_protocol(encoder, tmp_path):
    words = []
    changes = [["--lr_scheduler_type", "linear"], ["--lr_milestones", "1"], ["--weight_decay", "0.1"]]
    changes += [["--optim", "lars", "--optim_args", "momentum=0.9,classic=true"], ["--warmup_epochs", "0.5"]]
    changes += [["--max_grad_norm", "1"], ["--optim", "adamw_torch", "--adam_beta2", "0.95", "--max_grad_norm", "2"]]
    changes += [["--lr_scheduler_type", "cosine_with_min_lr", "--lr_scheduler_kwargs", '{"min_lr": 0.001}']]
    changes += [["--bf16", "True"], ["--horizontal_flip", "False"]]
    for flags in ([], *changes):
        run = parse_finetune([str(encoder), *TINY, "--output_dir", str(tmp_path), *flags])
        splits = load_images(run.data, labelled=True)
        words.append(run.protocol(build_trainer(run, splits, choose_labelled(splits, run.training))))
    assert [w.removeprefix(words[0]) for w in words[1:]] == [
        ", linear",
        ", a tenth at 1",
        ", sgd momentum=0.9, weight decay 0.1",
        ", lars momentum=0.9,classic=true, weight decay 0",
        ", cosine after a warm-up of 0.5 epochs",
        ", gradients clipped to 1",
        ", adamw_torch adam_beta2=0.95, weight decay 0, gradients clipped to 2",
        ", cosine_with_min_lr min_lr=0.001",
        ", trained in bf16",
        ", no flips",
    ]


def test_the_batch_is_part_of_the_protocol(encoder, tmp_path):
    run = parse_finetune([str(encoder), *TINY, "--output_dir", str(tmp_path), "--global_batch_size", "16"])
    splits = load_images(run.data, labelled=True)
    trainer = build_trainer(run, splits, choose_labelled(splits, run.training))
    assert ", learning rates 0.05 and 0.05, batch 16" in run.protocol(trainer)


# Which labels


@pytest.fixture(scope="module")
def labels() -> np.ndarray:
    """Class 0 has 5 images, class 1 none, class 2 has 150, class 3 has 1,000, in a random order."""
    return np.random.default_rng(1).permutation(np.repeat([0, 2, 3], [5, 150, 1000]))


@pytest.mark.parametrize(
    ("fraction", "counts"),
    [
        (0.01, [1, 0, 2, 10]),
        (0.1, [1, 0, 15, 100]),
        (0.5, [2, 0, 75, 500]),
        (1e-9, [1, 0, 1, 1]),
        (1.0, [5, 0, 150, 1000]),
    ],
)
def test_every_class_gives_its_share_and_at_least_one_image(labels, fraction, counts):
    drawn = draw_split(labels, fraction, seed=0)
    assert np.bincount(labels[drawn], minlength=4).tolist() == counts
    assert len(set(drawn.tolist())) == sum(counts)


def test_a_seed_draws_one_split_and_more_labels_hold_those_of_fewer(labels):
    one, ten = draw_split(labels, 0.01, seed=3), draw_split(labels, 0.1, seed=3)
    assert np.array_equal(one, draw_split(labels, 0.01, seed=3))
    assert set(one) < set(ten) < set(draw_split(labels, 1.0, seed=3))
    assert not np.array_equal(one, draw_split(labels, 0.01, seed=4))
    # No place in the dataset is preferred: folders are sorted.
    places = np.concatenate([draw_split(np.zeros(100, dtype=int), 0.1, seed) for seed in range(200)])
    assert np.bincount(places // 50).min() > 900


# Which rates


def test_the_defaults_are_those_that_were_published(tmp_path):
    # README of facebookresearch/vicreg: rates of backbone and classifier, epochs, weight decay; its evaluate.py: the rest.
    published = {0.01: (0.03, 0.08, 20), 0.1: (0.01, 0.1, 20), 1.0: (0.05, 0.05, 30)}
    nearest = {0.01: 0.01, 0.1: 0.1, 1.0: 1.0, 0.001: 0.01, 0.02: 0.01, 0.05: 0.1, 0.3: 0.1, 0.5: 1.0}
    for fraction, share in nearest.items():
        args = FinetuneArguments(output_dir=str(tmp_path), use_cpu=True, label_fraction=fraction)
        assert (args.learning_rate, args.head_learning_rate, args.num_train_epochs) == published[share]
        assert (args.global_batch_size, args.weight_decay, args.optim.value) == (256, 0.0, "sgd")
        assert (args.optim_args, args.lr_scheduler_type.value, args.lr_milestones) == ("momentum=0.9", "cosine", None)
    assert FinetuneArguments(output_dir=str(tmp_path), use_cpu=True).label_fraction == 1
    chosen = {"learning_rate": 1.0, "head_learning_rate": 2.0, "num_train_epochs": 3}
    args = FinetuneArguments(output_dir=str(tmp_path), use_cpu=True, label_fraction=0.1, **chosen)
    assert {name: getattr(args, name) for name in chosen} == chosen


def test_the_first_step_moves_encoder_and_classifier_each_by_its_scaled_rate(encoder, tmp_path):
    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            self.expected = {
                name: p.detach() - (0.5 if name.startswith("classifier.") else 0.02) * p.grad
                for name, p in model.named_parameters()
            }

    watch = Watch()
    # Both are for 256 images, and a step has 16.
    flags = ["--learning_rate", "0.32", "--head_learning_rate", "8", "--learning_rate_scaling", "linear"]
    flags += ["--max_steps", "1", "--eval_strategy", "no"]
    trainer = build(encoder, tmp_path, *flags, callback=watch)
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(parameter.detach(), watch.expected[name], msg=name)
    assert len(watch.expected) == len(list(trainer.model.parameters()))


def test_both_rates_follow_the_cosine_of_whole_epochs(encoder, tmp_path):
    class Watch(TrainerCallback):
        rates = []

        def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            self.rates.append([group["lr"] for group in optimizer.param_groups])

    watch = Watch()
    build(encoder, tmp_path, "--label_fraction", "0.2", "--eval_strategy", "no", callback=watch).train()
    steps = len(watch.rates) // 2
    assert watch.rates == [[0.01, 0.1]] * steps + [pytest.approx([0.005, 0.05])] * steps


@pytest.mark.parametrize("part", ["moco", "classifier"])
def test_a_rate_of_zero_freezes_the_weights_of_its_part_alone(part, encoder, tmp_path):
    flag = {"moco": "--learning_rate", "classifier": "--head_learning_rate"}[part]
    trainer = build(encoder, tmp_path, flag, "0", "--max_steps", "2", "--eval_strategy", "no")
    before = copy_of(trainer.model)
    trainer.train()
    moved = changed(trainer.model, before)
    weights = {name for name, _ in trainer.model.named_parameters()}
    assert moved & weights == {name for name in weights if not name.startswith(part)}
    # BatchNorm sees the labelled images in training mode, whatever the rates.
    statistics = {name for name, _ in trainer.model.named_buffers()}
    assert moved - weights == statistics
    assert any("running_mean" in name for name in statistics)


def test_a_last_batch_of_one_image_is_left_out_as_batch_norm_could_not_normalise_it(encoder, tmp_path):
    flags = ["--eval_strategy", "no", "--global_batch_size", "8"]
    trainer = build(encoder, tmp_path, *flags, "--max_train_samples", "33")
    assert len(trainer.train_dataset) % 8 == 1
    trainer.train()
    assert trainer.state.global_step == 2 * 4
    whole = build(encoder, tmp_path / "two", *flags, "--max_train_samples", "34")
    whole.train()
    assert whole.state.global_step == 2 * 5


# What is left behind


@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(encoder, tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 6  # within the second epoch of four steps

    flags = ["--label_fraction", "0.5", "--save_strategy", "steps", "--save_steps", "2"]
    whole = build(encoder, tmp_path / "whole", *flags)
    whole.train()
    assert whole.state.max_steps == 8
    build(encoder, tmp_path / "parts", *flags, callback=Stop()).train()
    resumed = build(encoder, tmp_path / "parts", *flags)
    resumed.train(resume_from_checkpoint=True)
    assert not changed(resumed.model, copy_of(whole.model))
    assert resumed.evaluate()["eval_loss"] == whole.evaluate()["eval_loss"]


class Terminate(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.slow
def test_the_script_can_be_stopped_continued_and_leaves_a_classifier_with_its_results(
    encoder, tmp_path, capsys, monkeypatch
):
    folder = tmp_path / "run"
    command = [str(encoder), *TINY, "--label_fraction", "0.3", "--output_dir", str(folder)]
    with monkeypatch.context() as patch:
        patch.setattr(finetune, "announce", lambda run, trainer: trainer.add_callback(Terminate()))
        with pytest.raises(SystemExit) as end:
            finetune.main(command)
    assert end.value.code == 75
    assert "Stopped by SIGTERM at step 2" in capsys.readouterr().out
    split = (folder / "split.json").read_bytes()
    finetune.main(command)
    out = capsys.readouterr().out
    assert f"Continuing from {folder}/checkpoint-2" in out
    assert "Learning rates of VICReg (arXiv:2105.04906), for 10% of the labels." in out
    assert "they are for a global batch of 256; for 16 the linear rule gives --learning_rate 0.000625 " in out
    assert (folder / "split.json").read_bytes() == split

    metrics = json.loads((folder / "metrics.json").read_text())
    images = metrics["labelled_images"]
    protocol = f"fine-tuning on 30 % of the labels ({images} images), 2 epochs, learning rates 0.01 and 0.1, batch 16"
    assert metrics["protocol"] == protocol
    results = json.loads((encoder / "results.json").read_text())
    assert [(r["protocol"], r["metric"], r["value"], r["n"], r["seed"]) for r in results] == [
        (protocol, name, metrics[name], 40, 0) for name in ("top1", "top5")
    ]
    finetune.main(command)  # finished, it evaluates again and repeats no result
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    assert json.loads((encoder / "results.json").read_text()) == results
    model = MoCoModel.from_pretrained(encoder)
    assert results[0]["model"] == encoder_digest(model)  # the encoder that was evaluated, not what it became
    assert results[0]["settings"]["labelled_images"] == images

    classify = pipeline("image-classification", model=str(folder))
    rows = list(load_digits()["test"].select(range(40)))
    hits = [classify(row["image"].convert("RGB"))[0]["label"] == str(row["label"]) for row in rows]
    assert 100 * np.mean(hits) == pytest.approx(metrics["top1"])
    for name, accuracy in metrics["per_class"].items():
        own = [hit for hit, row in zip(hits, rows, strict=True) if str(row["label"]) == name]
        assert accuracy == (pytest.approx(100 * np.mean(own)) if own else None)
    saved = MoCoForImageClassification.from_pretrained(folder)
    norms = {type(module) for module in saved.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)}
    assert norms == {torch.nn.BatchNorm2d}  # the groups of pretraining keep the keys apart, and fine-tuning has none
    assert saved.config.batch_norm == "split"  # as in pretraining
    assert changed(saved.moco, copy_of(Encoder(str(encoder)).load(MoCoForImageClassification, 0).moco))


def test_a_training_of_so_many_steps_is_recorded_without_epochs(encoder, tmp_path):
    finetune.main([str(encoder), *TINY, "--max_steps", "1", "--output_dir", str(tmp_path / "run")])
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert [result["protocol"].split(", ")[1] for result in results] == ["1 steps", "1 steps"]
    assert all(result["settings"]["steps"] == 1 and "epochs" not in result["settings"] for result in results)


def test_the_split_is_saved_reread_and_refused_once_the_data_has_changed(encoder, tmp_path):
    run = parse_finetune([str(encoder), *TINY, "--label_fraction", "0.1", "--output_dir", str(tmp_path)])
    splits = load_images(run.data, labelled=True)
    drawn = choose_labelled(splits, run.training)
    save_split(splits, run.training, drawn)
    path = tmp_path / "split.json"
    saved = json.loads(path.read_text())
    assert (saved["dataset"], saved["train_images"], saved["seed"], saved["label_fraction"]) == ("digits", 120, 0, 0.1)
    assert sorted(i for images in saved["indices"].values() for i in images) == drawn.tolist()
    for name, images in saved["indices"].items():
        assert {splits.class_names[label] for label in splits.train[images]["label"]} == {name}
    # What is written counts, whatever another version of numpy would draw.
    digits = splits.train["label"][:]
    saved["indices"]["0"] = [digits.index(0)]
    path.write_text(json.dumps(saved))
    reread = choose_labelled(splits, run.training)
    assert reread.tolist() != drawn.tolist()
    assert digits.index(0) in reread
    save_split(splits, run.training, reread)
    assert json.loads(path.read_text()) == saved

    saved["indices"]["0"] = [digits.index(1)]
    path.write_text(json.dumps(saved))
    with pytest.raises(ValueError, match=r"split\.json names images that digits does not have .* another --output_dir"):
        save_split(splits, run.training, choose_labelled(splits, run.training))
    assert json.loads(path.read_text()) == saved


@pytest.mark.parametrize(
    "content", ['{"indices": {"0": [3, 5', '{"indices": [3, 5]}', "[]", '{"indices": {"0": ["3"]}}']
)
def test_a_damaged_split_is_refused_in_one_line_and_left_alone(content, encoder, tmp_path):
    run = parse_finetune([str(encoder), *TINY, "--output_dir", str(tmp_path)])
    splits = load_images(run.data, labelled=True)
    (tmp_path / "split.json").write_text(content)
    with pytest.raises(ValueError, match=r"split\.json .*: bring it back, or delete it, and images are drawn") as error:
        choose_labelled(splits, run.training)
    assert len(str(error.value).splitlines()) == 1
    assert (tmp_path / "split.json").read_text() == content


def test_folders_are_named_after_the_share_of_the_labels_and_random_encoders_have_their_own(encoder):
    for flags, folder in (
        ([], "finetune_100pct"),
        (["--label_fraction", "0.01"], "finetune_1pct"),
        (["--label_fraction", "0.07", "--random_encoder"], "random_encoder/finetune_7pct"),
    ):
        run = parse_finetune([str(encoder), *TINY, *flags])
        assert Path(run.training.output_dir) == encoder / folder


def test_a_random_encoder_forgets_the_weights(encoder, tmp_path):
    trained, random = (
        build(encoder, tmp_path / name, *flags) for name, flags in (("a", []), ("b", ["--random_encoder"]))
    )
    assert trained.encoder == encoder_digest(MoCoModel.from_pretrained(encoder))
    assert random.encoder != trained.encoder


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--label_fraction", "0"], "label_fraction (0) must lie in (0, 1]: 0.01 for 1 % of the labels"),
        (["--label_fraction", "1.5"], "label_fraction (1.5) must lie in (0, 1]"),
        (["--label_fraction", "10"], "label_fraction (10) must lie in (0, 1]"),
        (["--label_fraction", "nan"], "label_fraction (nan) must lie in (0, 1]"),
        (["--head_learning_rate", "-1"], "head_learning_rate (-1) must be at least 0"),
        (["--max_train_samples", "0"], "max_train_samples (0) must be at least 1"),
        (["--label_fractoin", "1"], "did you mean '--label_fraction'"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_written(flags, message, encoder, tmp_path, script, capsys):
    with pytest.raises(SystemExit) as end:
        script("finetune").main([str(encoder), *TINY, "--output_dir", str(tmp_path / "run"), *flags])
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert not (tmp_path / "run").exists()


def test_a_fine_tuning_that_is_refused_leaves_no_folder_in_the_dataset(encoder, tmp_path, script, capsys):
    """Or the empty folder would be a class, or a split, of the next run."""
    for i, row in enumerate(load_digits()["train"].select(range(8))):
        path = tmp_path / "photos" / ("train", "test")[i // 4] / str(i % 2) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        row["image"].save(path)
    inside = tmp_path / "photos" / "train" / "new" / "run"
    data = ["--dataset_name", str(tmp_path / "photos"), "--max_train_samples", "4", "--max_eval_samples", "4"]
    with pytest.raises(SystemExit):
        script("finetune").main([str(encoder), *TINY, *data, "--output_dir", str(inside)])
    assert f"{inside} lies in {tmp_path / 'photos'}" in capsys.readouterr().err
    assert not inside.parent.exists()


def _rank(rank: int, encoder: str, folder: str) -> None:
    join_trainers(rank, str(Path(folder).parent), 2)
    flags = ["--label_fraction", "0.5", "--max_steps", "2", "--eval_strategy", "no"]
    trainer = build(encoder, folder, *flags, "--per_device_eval_batch_size", "20")  # which divides the images evenly
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model(folder)
    torch.save((trainer.train_dataset.source["label"][:], metrics["eval_loss"]), f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_train_on_one_split_and_evaluate_the_model_that_they_save(encoder, tmp_path):
    folder = tmp_path / "run"
    run_ranks(_rank, (str(encoder), str(folder)), 2)
    (labels, loss), (other_labels, other_loss) = (torch.load(folder / f"rank{rank}.pt") for rank in range(2))
    assert labels == other_labels
    saved = build(folder, tmp_path / "again", "--label_fraction", "0.5")
    saved.model.load_state_dict(MoCoForImageClassification.from_pretrained(folder).state_dict())  # its classifier too
    assert saved.evaluate()["eval_loss"] == pytest.approx(loss, rel=1e-5)
    assert loss == pytest.approx(other_loss, rel=1e-6)
