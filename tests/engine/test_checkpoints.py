"""A run stopped anywhere goes on as if nothing had happened; damaged checkpoints, full disks and SIGTERM lose little."""

import itertools
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import join_trainers, run_ranks
from safetensors.torch import load_file
from tiny_trainer import BATCH, IMAGES, StopAt, build, image_rows, tiny_model
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from training.data.images import MapImages
from training.engine.checkpoints import BatchLayout, check_layout, find_defect, newest_complete, rotate, write_manifest
from training.engine.preemption import outlive_signals
from training.errors import TrainingError
from training.evaluation.features import extract_features
from training.monitor import Monitor
from training.views.pil import EvaluationView

# Of stream, workers and accumulation; the other half of the combinations is slow.
EVERY_TIME = [(False, 0, 4)]  # a stream: tests/test_training_methods.py
SAVING = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": None}


@pytest.fixture(scope="module")
def rows():
    return image_rows()


def losses(trainer) -> list[tuple[int, float]]:
    return [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]


def assert_same_end(ours, whole):
    assert losses(ours) == losses(whole)
    state = ours.model.state_dict()
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(state[name], tensor), name


class Terminate(TrainerCallback):
    """Sends a signal to this process and its workers in a step, from another process, as a terminal does.

    A SIGTERM is sent twice, as launchers forward what their processes get anyway.
    """

    def __init__(self, step, name="TERM"):
        self.step, self.name = step, name

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            group = [os.getpid(), *(worker.pid for worker in multiprocessing.active_children())]
            assert len(group) > args.dataloader_num_workers
            for _ in range(2 if self.name == "TERM" else 1):
                subprocess.run(["kill", f"-{self.name}", *map(str, group)], check=True)


# Exact resume


@pytest.mark.parametrize(
    ("stream", "workers", "accumulation"),
    [
        pytest.param(*case, marks=[pytest.mark.slow] * (case not in EVERY_TIME))
        for case in itertools.product([False, True], [0, 2], [1, 4])
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(rows, tmp_path, stream, workers, accumulation):
    options = SAVING | {
        "stream": stream,
        "dataloader_num_workers": workers,
        "gradient_accumulation_steps": accumulation,
    }
    whole = build(rows, tmp_path / "whole", **options)
    whole.train()
    # Within the first epoch, at its end, within the second, and twice.
    for stops in ((3,), (6,), (8,), (2, 9)) if accumulation == 1 else ((1,), (3,)):
        folder = tmp_path / str(stops)
        build(rows, folder, callback=StopAt(stops[0]), **options).train()
        for stop in stops[1:]:
            build(rows, folder, callback=StopAt(stop), **options).train(resume_from_checkpoint=True)
        resumed = build(rows, folder, **options)
        resumed.train(resume_from_checkpoint=True)
        assert_same_end(resumed, whole)
        assert not any(p.requires_grad for p in resumed.model.encoder_k.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_a_resumed_run_on_images_in_memory_is_the_uninterrupted_one(rows, tmp_path, workers):
    options = SAVING | {"memory": True, "dataloader_num_workers": workers}
    whole = build(rows, tmp_path / "whole", **options)
    whole.train()
    build(rows, tmp_path / "parts", callback=StopAt(8), **options).train()
    resumed = build(rows, tmp_path / "parts", **options)
    resumed.train(resume_from_checkpoint=True)
    assert_same_end(resumed, whole)
    epochs = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert len(set(epochs)) == len(epochs)  # views of their own in every epoch


def watch_images(trainer) -> list[torch.Tensor]:
    """Both views of every batch that the trainer's model is going to see."""
    seen = []
    trainer.model.register_forward_pre_hook(
        lambda model, args, inputs: seen.append(torch.cat([inputs["pixel_values"], inputs["key_pixel_values"]], dim=1)),
        with_kwargs=True,
    )
    return seen


def _rank(rank: int, folder: str) -> None:
    join_trainers(rank, folder, 2)
    rows = image_rows()

    def run(name: str, seed: int, **kwargs):
        # Each rank begins with weights and a queue of its own, part of which outlives the run: training makes them equal.
        return build(
            rows, f"{folder}/{name}", tiny_model(batch_norm="shuffle", queue_size=128, seed=seed), **SAVING, **kwargs
        )

    symmetric = tiny_model(batch_norm="shuffle", seed=rank, symmetric_loss=True)
    trainer = build(rows, f"{folder}/symmetric", symmetric, eval_strategy="no")
    trainer.train()
    torch.save(symmetric.state_dict(), f"{folder}/symmetric{rank}.pt")
    for name, stream in (("map", False), ("stream", True)):
        whole = run(f"{name}_whole", rank, stream=stream)
        seen = watch_images(whole)
        whole.train()
        torch.save(seen, f"{folder}/{name}_images{rank}.pt")
        run(f"{name}_parts", rank, callback=StopAt(4), stream=stream).train()
        resumed = run(f"{name}_parts", 10 + rank, stream=stream)
        resumed.train(resume_from_checkpoint=f"{folder}/{name}_parts/checkpoint-4")
        assert_same_end(resumed, whole)
        torch.save(resumed.model.state_dict(), f"{folder}/{name}{rank}.pt")
    # SIGTERM reaches one of them: both save after the same step.
    killed = run("killed", rank, callback=Terminate(2) if rank == 1 else None)
    killed.train()
    assert killed.stopped_by
    assert killed.state.global_step == 2
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_resume_exactly_and_agree_bit_for_bit(rows, tmp_path):
    run_ranks(_rank, (str(tmp_path),), 2)
    for name in ("map", "stream", "symmetric"):
        first, second = (torch.load(tmp_path / f"{name}{rank}.pt") for rank in range(2))
        own = [key for key in first if not torch.equal(first[key], second[key])]
        assert own  # each process keeps the statistics of the images that it saw
        assert all("running" in key for key in own)
    assert find_defect(tmp_path / "killed" / "checkpoint-2") is None
    # One process with batches of twice the size sees the same views of the same images, in the same order.
    alone = build(rows, tmp_path / "alone", per_device_train_batch_size=2 * BATCH)
    seen = watch_images(alone)
    alone.train()
    parts = [torch.load(tmp_path / f"map_images{rank}.pt") for rank in range(2)]
    assert len(seen) == 6
    assert all(torch.equal(whole, torch.cat(both)) for whole, *both in zip(seen, *parts, strict=True))


# Checkpoints that do not count


@pytest.fixture(scope="module")
def saved(rows, tmp_path_factory):
    """A run's folder with the checkpoints 1 to 6."""
    folder = tmp_path_factory.mktemp("saved")
    trainer = build(rows, folder, num_train_epochs=1, **SAVING)
    trainer.train()
    return folder, trainer


@pytest.mark.parametrize("damage", ["truncated", "missing", "unfinished", "empty manifest"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(saved, tmp_path, damage):
    folder = tmp_path / "run"
    shutil.copytree(saved[0], folder)
    newest = folder / "checkpoint-6"
    if damage == "truncated":
        os.truncate(newest / "optimizer.pt", 1000)
    elif damage == "empty manifest":
        os.truncate(newest / "manifest.json", 0)
    else:
        (newest / {"missing": "model.safetensors", "unfinished": "manifest.json"}[damage]).unlink()
    checkpoint, remarks = newest_complete(folder)
    assert checkpoint == folder / "checkpoint-5"
    assert len(remarks) == 1
    assert str(newest) in remarks[0]
    sign = {"truncated": "optimizer.pt has 1,000 bytes", "missing": "model.safetensors is missing"}
    sign["empty manifest"] = "its manifest.json cannot be read"
    assert sign.get(damage, "not written to the end") in remarks[0]


def test_a_damaged_checkpoint_is_written_anew_when_the_run_gets_there(rows, saved, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(saved[0], folder)
    os.truncate(folder / "checkpoint-6" / "model.safetensors", 1000)
    resumed = build(rows, folder, num_train_epochs=1, **SAVING)
    resumed.train(resume_from_checkpoint=str(newest_complete(folder)[0]))
    assert find_defect(folder / "checkpoint-6") is None
    assert_same_end(resumed, saved[1])


def test_rotation_keeps_complete_checkpoints_and_the_best(tmp_path, monkeypatch):
    for step in (1, 2, 3, 20):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if step < 20:
            write_manifest(tmp_path / f"checkpoint-{step}", layout())
    monkeypatch.chdir(tmp_path)
    rotate(Path("./"), None, None)
    assert len(list(tmp_path.iterdir())) == 4
    rotate(Path("./"), 1, "./checkpoint-1")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-3"]


def test_a_copy_of_a_checkpoint_is_the_users(tmp_path):
    for name in ("checkpoint-2", "checkpoint-3", "checkpoint-1-good", "checkpoint-9_before", "checkpoints-7"):
        (tmp_path / name).mkdir()
        write_manifest(tmp_path / name, layout())
    assert newest_complete(tmp_path) == (tmp_path / "checkpoint-3", [])
    rotate(tmp_path, 1, None)
    left = ["checkpoint-1-good", "checkpoint-3", "checkpoint-9_before", "checkpoints-7"]
    assert sorted(path.name for path in tmp_path.iterdir()) == left


@pytest.mark.parametrize("name", ["checkpoints", "checkpoint-6"])
def test_a_run_may_be_called_checkpoint(rows, tmp_path, name):
    """Its folder was begun anew as a checkpoint when the model was saved there."""
    folder = tmp_path / name
    trainer = build(rows, folder, num_train_epochs=1, **SAVING)
    trainer.train()
    before = {path.name for path in folder.iterdir()}
    trainer.save_model(str(folder))
    assert {path.name for path in folder.iterdir()} >= before | {"model.safetensors"}
    assert newest_complete(folder)[0] == folder / "checkpoint-6"


def test_only_the_newest_checkpoints_are_kept(rows, tmp_path):
    build(rows, tmp_path, num_train_epochs=1, **SAVING | {"save_total_limit": 2}).train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-5", "checkpoint-6"]
    assert all(find_defect(path) is None for path in tmp_path.glob("checkpoint-*"))


def test_a_full_disk_is_one_error_and_earlier_checkpoints_stay(rows, tmp_path):
    """A limit on the size of files stands for the full disk: the weights still fit, the optimizer's state does not."""

    class Fill(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                size = (tmp_path / "checkpoint-2" / "model.safetensors").stat().st_size
                resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, hard))

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(
            TrainingError, match=r"checkpoint-3 could not be written .* good checkpoint is .*checkpoint-2"
        ):
            build(rows, tmp_path, callback=Fill(), **SAVING).train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    assert newest_complete(tmp_path) == (tmp_path / "checkpoint-2", [])


# Another division of the images


def layout(**kwargs) -> BatchLayout:
    defaults = {
        "processes": 8,
        "per_device_batch_size": 32,
        "accumulation": 1,
        "images": 2560,
        "workers": None,
        "epoch": 1.5,
    }
    return BatchLayout(**defaults | kwargs)


def test_another_division_goes_on_where_that_is_defined_and_is_refused_elsewhere(tmp_path):
    write_manifest(tmp_path, layout())
    assert check_layout(tmp_path, layout(epoch=0.0)) is None
    remark = check_layout(tmp_path, layout(processes=4, per_device_batch_size=64))
    assert "was trained on 8 processes x 32 images x 1 accumulated, this run on 4 processes x 64 images" in remark
    assert "BatchNorm normalises them in other groups" in remark
    with pytest.raises(
        ValueError, match=r"global batch of 256 .* this run has 128 .*same global batch, or pass another"
    ):
        check_layout(tmp_path, layout(processes=4))
    for epoch, now in ((1.5, {"workers": 4}), (1.5, {"processes": 4, "per_device_batch_size": 64, "workers": 2})):
        write_manifest(tmp_path, layout(workers=2, epoch=epoch))
        with pytest.raises(ValueError, match=r"within an epoch of a stream read by 8 processes x 2 workers"):
            check_layout(tmp_path, layout(**now))
        write_manifest(tmp_path, layout(workers=2, epoch=2.0))
        check_layout(tmp_path, layout(**now))


@pytest.mark.parametrize("now", [{"images": 1_281_168}, {"processes": 4, "accumulation": 2}])
def test_epochs_of_another_length_are_refused(tmp_path, now):
    # 8 x 32 images make 5,004 steps of ImageNet; 4 x 32 x 2 make one more, of a single micro-batch.
    write_manifest(tmp_path, layout(images=1_281_167))
    with pytest.raises(ValueError, match=r"epochs of 5,004 steps of 1,281,167 images .* its place would be another"):
        check_layout(tmp_path, layout(**{"images": 1_281_167} | now))


@pytest.mark.slow
def test_steps_per_epoch_are_those_of_the_trainer(rows, tmp_path):
    for batch, accumulation in ((4, 1), (4, 4), (5, 2), (3, 3)):
        sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        trainer = build(rows, tmp_path / f"{batch}{accumulation}", num_train_epochs=1, **sizes)
        trainer.train()
        assert trainer.batch_layout.steps_per_epoch == trainer.state.global_step


# Signals and numbers


@pytest.mark.parametrize(
    ("workers", "stream", "name"),
    [
        (0, False, "INT"),
        pytest.param(0, False, "TERM", marks=pytest.mark.slow),
        *(pytest.param(2, *case, marks=pytest.mark.slow) for case in ((False, "TERM"), (True, "TERM"), (False, "INT"))),
    ],
)
def test_a_signal_saves_after_the_step_and_the_run_goes_on_exactly(rows, tmp_path, workers, stream, name):
    options = {"dataloader_num_workers": workers, "save_strategy": "epoch", "stream": stream}
    options["dataloader_persistent_workers"] = workers > 0
    whole = build(rows, tmp_path / "whole", **options)
    whole.train()
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    stopped = build(rows, tmp_path / "run", callback=Terminate(8, name), **options)
    stopped.train()
    assert stopped.stopped_by == signal.Signals[f"SIG{name}"]
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-8"]
    resumed = build(rows, tmp_path / "run", **options)
    resumed.train(resume_from_checkpoint=str(newest_complete(tmp_path / "run")[0]))
    assert not resumed.stopped_by
    assert_same_end(resumed, whole)


@pytest.mark.slow
def test_sigterm_within_an_epoch_does_not_spend_its_time_on_an_evaluation(rows, tmp_path):
    trainer = build(rows, tmp_path, callback=Terminate(8), save_strategy="epoch")
    trainer.args.eval_strategy, trainer.args.knn_k = "epoch", [3]
    images = MapImages(rows, EvaluationView(24, 24))
    trainer.monitor = Monitor(trainer.model, trainer.args.knn, images, images)
    trainer.train()
    assert trainer.stopped_by
    assert [entry["epoch"] for entry in trainer.state.log_history if "eval_knn_top1" in entry] == [1.0]


def test_sigterm_in_the_last_step_lets_the_run_end(rows, tmp_path):
    trainer = build(rows, tmp_path, callback=Terminate(12), save_strategy="epoch")
    trainer.train()
    assert not trainer.stopped_by
    assert trainer.state.global_step == 12


def kill_worker(image, generator):
    """A view whose worker has just been sent SIGTERM by another process."""
    subprocess.run(["kill", "-TERM", str(os.getpid())], check=True)
    return EvaluationView(24, 24)(image, generator)


def test_workers_outlive_a_sigterm_that_is_not_their_parents(rows):
    images = MapImages(rows, kill_worker).rows(0, 6)
    features, _ = extract_features(tiny_model(), images, batch_size=2, num_workers=1)
    assert len(features) == 6
    others = set(multiprocessing.active_children())
    loader = DataLoader(images, num_workers=1, persistent_workers=True, worker_init_fn=outlive_signals)
    next(iter(loader))
    (worker,) = set(multiprocessing.active_children()) - others
    worker.terminate()
    worker.join(timeout=300)  # no test of speed: it ends at once, or never
    assert worker.exitcode == 0


class Poison(TrainerCallback):
    """Makes a weight of the query encoder NaN before a step, or after it."""

    def __init__(self, step, after=False):
        self.step, self.after = step, after

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step + 1 == self.step and not self.after:
            model.encoder_q.conv1[0].weight.data.fill_(float("nan"))

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step + 1 == self.step and self.after:
            model.encoder_q.conv1[0].weight.data.fill_(float("nan"))


@pytest.mark.parametrize(
    ("logging_steps", "after", "message"),
    [
        (1, False, "no longer finite since step 4; the last good checkpoint is .*checkpoint-3"),
        (5, False, "no longer finite since step 4; the last good checkpoint is .*checkpoint-3"),
        (100, True, "a weight is no longer finite since step 4; the last good checkpoint is .*checkpoint-3"),
    ],
)
def test_a_loss_that_is_not_finite_stops_the_run_and_is_not_saved(rows, tmp_path, logging_steps, after, message):
    saving = SAVING if after else SAVING | {"save_steps": 3}
    with pytest.raises(TrainingError, match=message):
        build(rows, tmp_path, callback=Poison(4, after), logging_steps=logging_steps, **saving).train()
    newest, remarks = newest_complete(tmp_path)
    assert newest == tmp_path / "checkpoint-3"
    assert not remarks
    assert all(t.isfinite().all() for t in load_file(newest / "model.safetensors").values())


def test_weights_that_the_last_update_spoils_are_an_error(rows, tmp_path):
    with pytest.raises(TrainingError, match="since step 12; there is no checkpoint yet"):
        build(rows, tmp_path, callback=Poison(12, after=True), logging_steps=100).train()


def test_a_manifest_lists_every_file_and_the_division(saved):
    checkpoint = saved[0] / "checkpoint-6"
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    assert set(manifest["files"]) == {p.name for p in checkpoint.iterdir()} - {"manifest.json"}
    assert manifest["files"]["model.safetensors"] == (checkpoint / "model.safetensors").stat().st_size
    assert BatchLayout(**manifest["batch_layout"]) == BatchLayout(1, BATCH, 1, IMAGES, None, 1.0)


def test_weights_in_a_pickle_are_not_continued_from(rows, saved, tmp_path):
    """A checkpoint that somebody has made, complete by its manifest. Trainer would take what tensors it has, and no more."""
    checkpoint = tmp_path / "run" / "checkpoint-5"
    shutil.copytree(saved[0] / "checkpoint-5", checkpoint)
    weights = load_file(checkpoint / "model.safetensors")
    torch.save(dict(itertools.islice(weights.items(), 3)), checkpoint / "pytorch_model.bin")
    for name in ("model.safetensors", "manifest.json"):
        (checkpoint / name).unlink()
    write_manifest(checkpoint, BatchLayout(1, BATCH, 1, IMAGES, None, 0.8))
    assert find_defect(checkpoint) is None
    with pytest.raises(
        TrainingError, match=r"checkpoint-5 has no model\.safetensors, and weights in other files are not"
    ):
        build(rows, tmp_path / "run", num_train_epochs=1, **SAVING).train(resume_from_checkpoint=str(checkpoint))


def test_an_interrupt_that_the_shell_has_switched_off_stays_off(rows, tmp_path):
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as for what runs in the background of a script
    try:
        trainer = build(rows, tmp_path, callback=Terminate(3, "INT"))
        trainer.train()
    finally:
        signal.signal(signal.SIGINT, previous)
    assert trainer.stopped_by is None
    assert trainer.state.global_step == 12
