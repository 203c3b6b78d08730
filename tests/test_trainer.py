"""The trainer around the official step: its updates, schedule, resume and refusals."""

import copy
import math
import sys
import time
from functools import partial
from itertools import pairwise
from statistics import median

import datasets
import pytest
import torch
from tiny_models import CHECKPOINTING
from tiny_trainer import BATCH, IMAGES, StopAt, build, image_rows, tiny_model
from transformers import TrainerCallback

from modeling_moco import MoCoConfig, MoCoForImageClassification, MoCoImageProcessor, MoCoModel
from training.data.images import MapImages
from training.data.sources import DataArguments
from training.monitor import Monitor
from training.pretrain import describe_bottleneck
from training.trainer import MoCoTrainer, MoCoTrainingArguments
from training.views.pil import EvaluationView, Views
from training.views.policy import build_policies


@pytest.fixture(scope="module")
def rows():
    return image_rows()


class Recorder(TrainerCallback):
    """Weights around every optimizer step, and the learning rate of each."""

    def __init__(self):
        self.rates, self.key_before, self.key_after, self.query_before = [], [], [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.rates.append(optimizer.param_groups[0]["lr"])
        self.query_before.append(copy.deepcopy(model.encoder_q.state_dict()))
        self.key_before.append(copy.deepcopy(model.encoder_k.state_dict()))

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.key_after.append(copy.deepcopy(model.encoder_k.state_dict()))


def test_every_trainable_parameter_moves_and_no_key_parameter_has_a_gradient(rows, tmp_path):
    model = tiny_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    build(rows, tmp_path, model).train()
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, before[name]), name
        assert parameter.requires_grad != name.startswith(("encoder_k", "projector_k")), name
        if not parameter.requires_grad:
            assert parameter.grad is None, name


@pytest.mark.parametrize("accumulate", [1, 2])
def test_one_momentum_update_per_optimizer_step_and_one_enqueue_per_micro_batch(rows, tmp_path, accumulate):
    recorder, model = Recorder(), tiny_model(key_momentum=0.75, queue_size=64)
    build(rows, tmp_path, model, recorder, gradient_accumulation_steps=accumulate, num_train_epochs=1).train()
    steps = 6 // accumulate
    assert len(recorder.key_after) == steps
    assert model.dictionary.queue_ptr.item() == 6 * BATCH
    weight = "layer1.0.conv1.weight"
    for i in range(1, steps):
        expected = 0.75 * recorder.key_after[i - 1][weight] + 0.25 * recorder.query_before[i][weight]
        torch.testing.assert_close(recorder.key_before[i][weight], expected, atol=1e-6, rtol=1e-5)


def test_the_queue_holds_the_keys_of_the_last_batches_normalised(rows, tmp_path):
    model = tiny_model()
    build(rows, tmp_path, model).train()
    torch.testing.assert_close(model.dictionary.queue.norm(dim=0), torch.ones(16))
    assert model.dictionary.queue_ptr.item() == 12 * BATCH % 16


def test_the_rate_is_the_official_cosine_in_whole_epochs(rows, tmp_path):
    recorder = Recorder()
    build(rows, tmp_path, callback=recorder, num_train_epochs=3, learning_rate=0.1).train()
    expected = [0.1 * 0.5 * (1 + math.cos(math.pi * epoch / 3)) for epoch in range(3) for _ in range(6)]
    assert recorder.rates == pytest.approx(expected)


def test_milestones_and_other_schedulers_are_followed(rows, tmp_path):
    recorder = Recorder()
    build(rows, tmp_path / "a", callback=recorder, num_train_epochs=3, learning_rate=1.0, lr_milestones=[1, 2]).train()
    assert recorder.rates == pytest.approx([1.0] * 6 + [0.1] * 6 + [0.01] * 6)
    recorder = Recorder()
    build(rows, tmp_path / "b", callback=recorder, learning_rate=1.0, lr_scheduler_type="linear").train()
    assert recorder.rates == pytest.approx([1 - i / 12 for i in range(12)])


def test_weight_decay_reaches_batch_norm_and_biases(rows, tmp_path):
    trainer = build(rows, tmp_path, weight_decay=0.01)
    trainer.create_optimizer()
    decays = {id(p): group["weight_decay"] for group in trainer.optimizer.param_groups for p in group["params"]}
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            assert decays[id(parameter)] == 0.01, name


@pytest.mark.parametrize(
    ("accumulate", "stop", "left"),
    [*(pytest.param(*case, marks=pytest.mark.slow) for case in ((1, 2, 10), (2, 4, 4))), (1, 8, 4), (4, 3, 2)],
)
def test_a_resumed_stream_decodes_no_image_that_it_skips(rows, tmp_path, accumulate, stop, left):
    options = {"stream": True, "save_strategy": "steps", "save_steps": 1, "gradient_accumulation_steps": accumulate}
    build(rows, tmp_path, callback=StopAt(stop), **options).train()
    resumed = build(rows, tmp_path, **options)
    images, views, decoded = resumed.train_dataset, resumed.train_dataset.transform, []
    images.transform = lambda image, generator: decoded.append(image) or views(image, generator)
    resumed.train(resume_from_checkpoint=True)
    assert len(decoded) == BATCH * left


def test_a_stream_resumed_without_a_skip_begins_its_epoch_again(rows, tmp_path):
    options = {"stream": True, "save_strategy": "steps", "save_steps": 1, "ignore_data_skip": True}
    build(rows, tmp_path, callback=StopAt(2), **options).train()
    resumed = build(rows, tmp_path, **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 12


def test_too_few_files_for_the_workers_of_a_stream_are_said_with_the_remedy(rows, tmp_path, caplog):
    trainer = build(rows, tmp_path, stream=True, dataloader_num_workers=2)
    assert trainer.get_train_dataloader().num_workers == 2
    assert not caplog.text
    trainer.train_dataset.rows = trainer.train_dataset.rows.first(IMAGES // 2)  # the second file is left out
    assert trainer.get_train_dataloader().num_workers == 2
    assert "the stream has 1 files for 2 workers" in caplog.text
    assert "lower dataloader_num_workers" in caplog.text


def test_metrics_cover_every_query_since_the_last_log(rows, tmp_path):
    trainer = build(rows, tmp_path, model=tiny_model(temperature=0.2), logging_steps=3, num_train_epochs=1)
    seen = []
    trainer.model.register_forward_hook(lambda module, args, outputs: seen.append(outputs))
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    for entry, part in zip(logged, (seen[:3], seen[3:]), strict=True):
        similarity = 0.2 * torch.cat([outputs.logits for outputs in part])
        rank = (similarity[:, 1:] > similarity[:, :1]).sum(dim=1)
        assert entry["contrast_top1"] == pytest.approx(100 * (rank == 0).float().mean().item())
        assert entry["contrast_top5"] == pytest.approx(100 * (rank < 5).float().mean().item())
        assert entry["positive_similarity"] == pytest.approx(similarity[:, 0].mean().item())
        hardest = similarity[:, 1:].max(dim=1).values.mean().item()
        assert entry["hardest_negative_similarity"] == pytest.approx(hardest)
        distances = [torch.pdist(outputs.query_embeds.detach()) for outputs in part]
        expected = torch.cat(distances).square().mul(-2).exp().mean().log().item()
        assert entry["uniformity"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("value", [1.0, float("nan")])
def test_a_collapsed_model_has_no_contrast_accuracy(rows, tmp_path, value):
    def collapse(module, args, outputs):
        outputs.logits = torch.full_like(outputs.logits, value)

    trainer = build(rows, tmp_path)
    trainer.model.register_forward_hook(collapse)
    trainer.train()
    assert all(entry["contrast_top5"] == 0 for entry in trainer.state.log_history if "loss" in entry)


class Clock(TrainerCallback):
    """A clock that stands still but for what an image, a step and an evaluation are said to take.

    At every log it notes its seconds so far, how many of them images took and how many evaluations.
    """

    def __init__(self, monkeypatch, image=0.0, step=0.0, evaluation=0.0):
        self.image, self.step, self.evaluation = image, step, evaluation
        self.now, self.for_images, self.evaluating = 1000.0, 0.0, 0.0
        self.logged = [(self.now, 0.0, 0.0)]
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def slow_down(self, transform):
        def slowly(image, generator):
            self.now += self.image
            self.for_images += self.image
            return transform(image, generator)

        return slowly

    def on_step_begin(self, args, state, control, **kwargs):
        self.now += self.step

    def on_evaluate(self, args, state, control, **kwargs):
        self.now += self.evaluation
        self.evaluating += self.evaluation

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.logged.append((self.now, self.for_images, self.evaluating))

    def windows(self) -> list[tuple[float, float]]:
        """Between two logs each: seconds of training, and how many of them images took."""
        return [
            (now - before - (evaluating - evaluated), images - earlier)
            for (before, earlier, evaluated), (now, images, evaluating) in pairwise(self.logged)
        ]


@pytest.mark.parametrize(("image", "step", "says"), [(3.0, 2.0, "data"), (0.25, 20.0, "compute")])
def test_the_log_says_what_a_run_has_waited_for(rows, tmp_path, monkeypatch, image, step, says):
    clock = Clock(monkeypatch, image, step)
    trainer = build(rows, tmp_path, callback=clock, num_train_epochs=1)
    trainer.train_dataset.transform = clock.slow_down(trainer.train_dataset.transform)
    trainer.train()
    shares = [entry["waiting_for_data"] for entry in trainer.state.log_history if "loss" in entry]
    assert shares == pytest.approx([100 * images / seconds for seconds, images in clock.windows()])
    assert len(set(shares)) > 1  # each of its own window: of the first, in which two batches are read, and others
    metrics = {"waiting_for_data": median(shares)}
    assert describe_bottleneck(metrics, DataArguments("digits"), torch.device("cpu")).startswith(says)


@pytest.mark.parametrize(
    ("given", "device", "advice"),
    [
        ({}, "cuda", "--dataloader_num_workers, or --view_backend cv2, or --view_backend device; for"),
        (
            {},
            "cpu",
            "--dataloader_num_workers, or --view_backend cv2; for large photographs --decode scaled, or a copy",
        ),
        (
            {"view_backend": "cv2", "decode": "scaled"},
            "cpu",
            "--dataloader_num_workers; for large photographs a copy by",
        ),
        ({"view_backend": "cv2"}, "cuda", "--dataloader_num_workers, or --view_backend device; for"),
        ({"view_backend": "device"}, "cuda", "--dataloader_num_workers; for large photographs --decode scaled"),
    ],
)
def test_a_run_that_waits_for_images_is_not_told_to_do_what_it_does(given, device, advice):
    said = describe_bottleneck({"waiting_for_data": 40.0}, DataArguments("digits", **given), torch.device(device))
    assert f"40 % of the time was waiting for images. More {advice}" in said


def test_images_per_second_are_those_of_training(rows, tmp_path, monkeypatch):
    clock = Clock(monkeypatch, step=2, evaluation=100)
    trainer = build(rows, tmp_path, callback=clock, num_train_epochs=1, eval_strategy="steps", eval_steps=3)
    trainer.train()
    assert clock.evaluating == 200
    rates = [entry["images_per_second"] for entry in trainer.state.log_history if "loss" in entry]
    assert rates == pytest.approx([BATCH / 2] * 6)


def test_evaluation_runs_every_n_epochs_and_at_the_end(rows, tmp_path):
    view = EvaluationView(24, 24)
    trainer = build(rows, tmp_path, num_train_epochs=5, eval_strategy="no")
    trainer.args.eval_strategy = "epoch"
    trainer.args.eval_every_n_epochs, trainer.args.knn_k, trainer.args.eval_on_start = 2, [3], True
    trainer.monitor = Monitor(trainer.model, trainer.args.knn, MapImages(rows, view), MapImages(rows, view))
    trainer.train()
    assert [e["epoch"] for e in trainer.state.log_history if "eval_knn_top1" in e] == [0, 2, 4, 5]


@pytest.mark.parametrize(
    ("kwargs", "batch", "message"),
    [
        ({"queue_size": 3}, 4, r"queue_size \(3\) is smaller than the keys of a global batch \(4\)"),
        ({"queue_size": 7, "symmetric_loss": True}, 4, r"queue_size \(7\) is smaller than the keys of a .* \(8\)"),
        ({"batch_norm": "split", "batch_norm_splits": 3}, 4, r"the batch per process \(4\) must be a multiple of"),
        ({"queue_size": 64}, 27, r"the dataset \(26 images\) is smaller than the global batch \(27\)"),
    ],
)
def test_sizes_that_cannot_work_are_refused_before_training(rows, tmp_path, kwargs, batch, message):
    with pytest.raises(ValueError, match=message):
        build(rows, tmp_path, tiny_model(**kwargs), per_device_train_batch_size=batch)


def test_a_model_in_16_bits_is_refused(rows, tmp_path):
    with pytest.raises(ValueError, match="bfloat16"):
        build(rows, tmp_path, tiny_model().to(torch.bfloat16))


class Photographs(torch.utils.data.Dataset):
    """Images of a user's own, as torchvision's datasets give them."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        if isinstance(self.items[index], Exception):
            raise self.items[index]
        return self.items[index]


def run_on(images, folder, **kwargs):
    args = MoCoTrainingArguments(
        str(folder),
        use_cpu=True,
        disable_tqdm=True,
        per_device_train_batch_size=BATCH,
        eval_strategy="no",
        max_steps=3,
        **kwargs,
    )
    processor = MoCoImageProcessor(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    trainer = MoCoTrainer(tiny_model(), args, images, processor)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_images_of_any_dataset_train_as_the_projects_own(rows, tmp_path):
    settings = {"logging_steps": 1, "save_strategy": "no"}
    expected = run_on(MapImages(rows, Views(build_policies("v2"), 24)), tmp_path, **settings)
    assert len(expected) == 3
    decoded = rows.cast_column("image", datasets.Image())
    pictures = [row["image"] for row in decoded]
    for images in (
        decoded.rename_column("image", "picture"),
        decoded.with_format("torch"),
        Photographs(pictures),
        Photographs([(picture, i) for i, picture in enumerate(pictures)]),
    ):
        assert run_on(images, tmp_path, **settings) == expected
    workers = {"dataloader_num_workers": 1, "dataloader_persistent_workers": False}
    assert run_on(Photographs(pictures), tmp_path, **settings, **workers) == expected


def test_a_file_that_a_dataset_cannot_read_costs_one_image_and_is_listed(rows, tmp_path):
    pictures = [row["image"] for row in rows.cast_column("image", datasets.Image())]
    assert len(run_on(Photographs([*pictures[:3], OSError("cut off"), *pictures[4:]]), tmp_path)) == 1
    assert (tmp_path / "unreadable_images.txt").read_text().splitlines() == ["row 3"]


@pytest.mark.parametrize("kind", ["tensors", "stream", "no images", "list", "transform"])
def test_a_dataset_without_images_by_index_is_refused_in_one_line(kind, rows, tmp_path):
    images = {
        "tensors": Photographs([torch.zeros(3, 24, 24)] * IMAGES),
        "stream": rows.to_iterable_dataset(),
        "no images": datasets.Dataset.from_dict({"text": ["a"] * IMAGES}),
        "list": [1] * IMAGES,
        "transform": rows.with_transform(lambda batch: batch),
    }[kind]
    with pytest.raises(ValueError, match=r"^train_dataset .*: (give|pass|keep|take)") as error:
        run_on(images, tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("model", "processor", "message"),
    [
        (
            MoCoForImageClassification,
            {},
            r"^model \(MoCoForImageClassification\) has no dictionary of keys: build MoCoModel",
        ),
        (
            partial(MoCoModel, momentum_encoder=False),
            {},
            r"^model \(MoCoModel\) has no dictionary .*without momentum_encoder",
        ),
        (
            MoCoModel,
            {"image_mean": 0.5},
            r"^processing_class has image_mean 0.5, and the model \[0.485, 0.456",
        ),
        (
            MoCoModel,
            {"do_center_crop": False},
            r"^processing_class \(MoCoImageProcessor\) cuts out no square, .*: pass",
        ),
        (MoCoModel, {"crop_size": {"height": 24, "width": 32}}, r"^processing_class .* cuts out no square"),
    ],
)
def test_a_model_or_an_image_processor_of_something_else_is_refused(rows, tmp_path, model, processor, message):
    model = model(MoCoConfig(architecture="test_resnet", queue_size=16))
    images = rows.cast_column("image", datasets.Image())
    with pytest.raises(ValueError, match=message) as error:
        MoCoTrainer(model, MoCoTrainingArguments(str(tmp_path), use_cpu=True), images, MoCoImageProcessor(**processor))
    assert "\n" not in str(error.value)


def test_what_a_contrastive_trainer_does_not_do_is_refused_with_the_remedy(rows, tmp_path):
    trainer = build(rows, tmp_path)
    for do, message in (
        (trainer.evaluate, "give the trainer knn_bank"),
        (trainer.predict, "MoCoForImageClassification"),
    ):
        with pytest.raises(ValueError, match=message):
            do(rows)


def test_gradient_checkpointing_changes_no_loss(rows, tmp_path):
    losses = []
    for enable in (False, True):
        trainer = build(rows, tmp_path, **{CHECKPOINTING: enable}, max_steps=3)
        trainer.train()
        assert getattr(trainer.model, f"is_{CHECKPOINTING}") == enable
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize(
    "setting",
    [
        {"num_train_epochs": 0},
        {"num_train_epochs": -1},
        {"max_steps": 0},
        {"max_steps": -5},
        {"dataloader_drop_last": False},
        {"remove_unused_columns": True},
        {"deepspeed": "zero.json"},
    ],
    ids=str,
)
def test_a_setting_of_transformers_that_cannot_work_is_refused_in_one_line(setting, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # whether it is installed or not
    ((name, value),) = setting.items()
    with pytest.raises(ValueError, match=rf"^{name} \({value!r}\)") as error:
        MoCoTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **setting)
    assert "\n" not in str(error.value)


def test_a_number_of_steps_replaces_the_epochs(rows, tmp_path):
    trainer = build(rows, tmp_path, max_steps=2, num_train_epochs=0)
    trainer.train()
    assert trainer.state.global_step == 2


def test_a_global_batch_that_does_not_divide_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"global_batch_size \(10\) must be a positive multiple of 3"):
        MoCoTrainingArguments(
            output_dir=str(tmp_path), use_cpu=True, global_batch_size=10, gradient_accumulation_steps=3
        )
