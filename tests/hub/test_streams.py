"""Training from a stream of a Hub: which requests it makes, which commit it reads, and what happens where the Hub fails."""

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import boxed_images
import masked_images
import pyarrow.parquet
import pytest
from hub_server import Hub, environment
from numbered_images import encoded, table

from modeling_moco import MoCoConfig, MoCoImageProcessor, MoCoModel
from training.engine.checkpoints import find_defect

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
ROWS, SHARDS, BATCH = 32, 4, 3
# The client keeps the address of its Hub from the import on, so that a process of its own reads.
BEGIN = """
import json, sys
import training.data.hub as hub
hub.PATIENCE, hub.FIRST_WAIT = 4.0, 0.1
from numbered_images import number, pixel, read
from training.data.images import StreamedImages
from training.data.sources import DataArguments, load_images
from training.errors import DataError

def images_of(name, ranks=1, rank=0):
    splits = load_images(DataArguments(dataset_name=name, streaming=True))
    settings = {"batch_size": 3, "rank": rank, "world_size": ranks, "buffer_size": 4, "decode": splits.decoder.image}
    return StreamedImages(splits.train, pixel, broken=splits.broken, **settings)
"""
RUN = """
import sys
import training.data.hub as hub
hub.PATIENCE, hub.FIRST_WAIT = 3.0, 0.1
from importlib import import_module
import_module(f"training.commands.{sys.argv[1]}").main(sys.argv[2:])
"""
FLAGS = (
    *("--recipe", "quickstart", "--dataset_name", "org/photos", "--streaming", "--global_batch_size", "8"),
    *("--num_train_epochs", "2", "--queue_size", "16", "--shuffle_buffer", "4", "--logging_steps", "1"),
    *("--dataloader_persistent_workers", "false"),
)


def parquet(numbers: range, size: int = 0, reverse: bool = False) -> bytes:
    """A shard of these images, of `size` bytes more each, in a row group each."""
    order = list(reversed(numbers)) if reverse else list(numbers)
    larger = {i: encoded(i) + os.urandom(size) for i in numbers}
    table(order, broken=larger).to_parquet(file := io.BytesIO(), batch_size=1)
    return file.getvalue()


def photos(reverse: bool = False) -> dict[str, bytes]:
    ranges = [range(8 * i, 8 * i + 8) for i in range(SHARDS)]
    files = {f"data/train-{i:05d}-of-00004.parquet": parquet(numbers, 0, reverse) for i, numbers in enumerate(ranges)}
    return files | {"data/test-00000-of-00001.parquet": parquet(range(ROWS, ROWS + 9))}


@dataclass
class Place:
    """A Hub with the dataset org/photos, and a folder for runs that read it."""

    hub: Hub
    folder: Path

    def python(self, code: str, *words: str) -> subprocess.CompletedProcess:
        env = environment(self.hub, self.folder / "cache") | {"NO_PROXY": "127.0.0.1,localhost"}
        env |= {"PYTHONPATH": f"{ROOT}/tests/support:{ROOT}", "HF_HUB_DISABLE_TELEMETRY": "1"}
        command = [sys.executable, "-W", "ignore", "-c", code, *words]
        return subprocess.run(command, env=env, cwd=self.folder, capture_output=True, text=True, timeout=300)

    def read(self, code: str) -> tuple[list, str]:
        """What a process has printed as JSON, a line each, and what it has logged."""
        done = self.python(BEGIN + code)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines() if line[0] in "[{"], done.stderr

    def pretrain(self, name: str, workers: int = 0) -> subprocess.CompletedProcess:
        words = ("--output_dir", name, "--dataloader_num_workers", str(workers))
        return self.python(RUN, "pretrain", *FLAGS, *words)

    def fail(self, path: str, *faults: str | int, times: int = 1, after: int = 0) -> None:
        self.hub.faults, self.hub.after = [[path, fault, times] for fault in faults], after

    def losses(self, name: str) -> list[float]:
        history = json.loads((self.folder / name / "trainer_state.json").read_text())["log_history"]
        return [entry["loss"] for entry in history if "loss" in entry]


@pytest.fixture
def place(tmp_path) -> Iterator[Place]:
    hub = Hub()
    hub.create_dataset("org/photos", photos())
    yield Place(hub, tmp_path)
    hub.close()


def test_an_epoch_reads_ranges_and_every_image_once_and_a_resume_reads_the_rest(place):
    code = """
import datasets
print([len(list(datasets.load_dataset("org/photos", streaming=True, split="train")))])
for ranks in (1, 2, 4):
    for workers in (0, 2):
        for rank in range(ranks):
            images = images_of("org/photos", ranks, rank)
            found = []
            for skipped in (0, 1, images.batches - 1):
                images.set_epoch(1, skipped)
                found.append([batch for batch in read(images, 3, workers) if batch[0] != []])  # skipped: empty
            print(json.dumps({"ranks": ranks, "workers": workers, "read": found}))
"""
    (theirs, *ours), _ = place.read(code)
    assert theirs == [ROWS]
    for ranks in (1, 2, 4):
        for workers in (0, 2):
            found = [each["read"] for each in ours if (each["ranks"], each["workers"]) == (ranks, workers)]
            read = [number for whole, *_ in found for batch in whole for number in batch]
            assert len(read) == len(set(read)) == ROWS // (BATCH * ranks) * BATCH * ranks
            assert set(read) <= set(range(ROWS))
            for whole, *rests in found:
                assert rests == [whole[1:], whole[-1:]]
    assert place.hub.ranges
    assert None not in place.hub.ranges


def test_a_run_keeps_the_commit_of_its_start_and_others_take_the_new_one(place):
    assert place.pretrain("whole").returncode == 0
    place.fail("_large", 404, times=1000, after=18)
    ended = place.pretrain("run")
    place.fail("")
    assert ended.returncode == 2, ended.stderr
    (old,) = place.hub.repos["datasets/org/photos"].commits
    assert f"org/photos: commit {old}, the newest" in ended.stdout
    assert len(list((place.folder / "run").glob("checkpoint-*"))) == 1
    shutil.copytree(place.folder / "run", place.folder / "other")

    new = place.hub.push("org/photos", photos(reverse=True))
    resumed = place.pretrain("run")
    assert resumed.returncode == 0, resumed.stderr
    assert f"org/photos: commit {old}, with which the run was begun" in resumed.stdout
    assert "continue: from run/checkpoint-4" in resumed.stdout
    content = {"train": f"commit {old}", "test": f"commit {old}"}
    assert json.loads((place.folder / "run" / "dataset.json").read_text())["content"] == content
    assert place.losses("run") == place.losses("whole")

    for words in (("knn", "run", "--knn_k", "3"), ("linear_probe", "run", "--num_train_epochs", "1")):
        done = place.python(RUN, f"evaluations.{words[0]}", *words[1:])
        assert done.returncode == 0, done.stderr
        assert f"org/photos: commit {old}, with which the run was begun" in done.stdout
    results = json.loads((place.folder / "run" / "results.json").read_text())
    assert {entry["data"]["revision"] for entry in results} == {f"commit {old}"}

    fresh = place.pretrain("fresh")
    assert f"org/photos: commit {new}, the newest" in fresh.stdout
    assert place.losses("fresh") != place.losses("whole")

    del place.hub.repos["datasets/org/photos"].commits[old]
    shutil.rmtree(place.folder / "cache")
    refused = place.pretrain("other")
    assert refused.returncode == 2
    (line,) = [line for line in refused.stderr.splitlines() if line]
    assert line.startswith(
        f"error: dataset_name (org/photos, commit {old} that the run was begun with) cannot be opened"
    )


def annotated(write, folder: Path, reverse: bool = False) -> dict[str, bytes]:
    """The Parquet files that `write` makes, also with their rows in the other order."""
    files = {}
    for path in sorted(write(folder).glob("*.parquet")):
        rows = pyarrow.parquet.read_table(path)
        pyarrow.parquet.write_table(rows.take(list(range(len(rows)))[::-1]) if reverse else rows, file := io.BytesIO())
        files[f"data/{path.name}"] = file.getvalue()
    return files


TRANSFER = {
    "detect": (
        boxed_images.write_parquet,
        ("--recipe", "bccd_quickstart", "--precise_bn_steps", "1", "--train_sizes", "64"),
    ),
    "segment": (masked_images.write_parquet, ("--recipe", "masks_quickstart", "--crop_size", "49")),
}


@pytest.mark.parametrize("task", TRANSFER)
def test_what_is_trained_around_an_encoder_keeps_the_commit_of_its_start_too(task, place):
    write, flags = TRANSFER[task]
    MoCoModel(MoCoConfig(architecture="test_resnet", queue_size=16)).save_pretrained(place.folder / "encoder")
    MoCoImageProcessor().save_pretrained(place.folder / "encoder")
    flags = (*flags, "--dataset_name", "org/drawn", "--use_cpu", "--global_batch_size", "2", "--max_steps", "2")

    def train(folder: str) -> subprocess.CompletedProcess:
        words = (*flags, "--step_milestones", "1", "--save_steps", "1", "--output_dir", str(place.folder / folder))
        return place.python(RUN, f"evaluations.{task}", str(place.folder / "encoder"), *words)

    place.hub.create_dataset("org/drawn", annotated(write, place.folder / "old"))
    (old,) = place.hub.repos["datasets/org/drawn"].commits
    begun = train("run")
    assert begun.returncode == 0, begun.stderr
    assert f"org/drawn: commit {old}, the newest" in begun.stdout
    for name in ("checkpoint-1", "dataset.json", "recipe.yaml"):  # what a run has that was killed after its first step
        source, target = place.folder / "run" / name, place.folder / "killed" / name
        shutil.copytree(source, target) if source.is_dir() else shutil.copyfile(source, target)

    new = place.hub.push("org/drawn", annotated(write, place.folder / "new", reverse=True))
    continued = train("killed")
    assert continued.returncode == 0, continued.stderr
    assert f"org/drawn: commit {old}, with which the run was begun" in continued.stdout
    weights = [(place.folder / name / "model.safetensors").read_bytes() for name in ("run", "killed")]
    assert weights[0] == weights[1]
    for again in (
        train("run"),
        place.python(RUN, f"evaluations.{task}", str(place.folder / "run"), "--eval_only", "--use_cpu"),
    ):
        assert again.returncode == 0, again.stderr
        assert f"org/drawn: commit {old}, with which the run was begun" in again.stdout
    results = json.loads((place.folder / "run" / "results.json").read_text())
    assert {entry["data"]["content"]["test"].rpartition(" of ")[2] for entry in results} == {f"commit {old}"}
    assert f"org/drawn: commit {new}, the newest" in train("fresh").stdout


def test_a_stream_waits_for_what_passes_and_says_so_once(place):
    name = "data/train-00000-of-00001.parquet"
    place.hub.create_dataset("org/large", {name: parquet(range(48), size=2**18)})
    code = "print(json.dumps([i for batch in read(images_of('org/large'), 3) for i in batch]))"
    place.read(code)
    before = len(place.hub.ranges)
    (rows,), _ = place.read(code)
    asked = len(place.hub.ranges) - before
    assert sorted(rows) == list(range(48))
    place.hub.retry_after = 1
    place.fail("_large", "cut", "short", "whole", 429, 503, after=asked - 1)
    (again,), said = place.read(code)
    assert again == rows
    assert not any(times for _, _, times in place.hub.faults)
    assert said.count("waiting for the Hub") == len(said.splitlines()) == 1

    place.fail("_large", "cut", times=1000, after=asked - 1)
    code = """
images = images_of("org/large")
try:
    read(images, 3)
except DataError as error:
    print(json.dumps([str(error), images.broken.numbers]))
"""
    ((error, broken),), said = place.read(code)
    assert "shard 0 of the stream, hf://datasets/org/large@" in error
    assert "cannot be read from row 0 on" in error  # pyarrow reads ahead of the rows that it gives
    assert "and no more than 4 s are waited for it" in error
    assert broken == []
    assert said.count("waiting for the Hub") == len(said.splitlines()) == 1


@pytest.mark.parametrize(
    ("path", "fault", "workers", "reason"),
    [
        ("_large", "noise", 0, "Parquet magic bytes not found"),
        ("train-0000", 404, 2, "Entry Not Found"),
        ("_large", 429, 2, "(429 Too Many Requests), and no more than 3 s are waited for it"),
        ("_large", "cut", 0, "and no more than 3 s are waited for it"),
    ],
)
def test_what_never_comes_ends_a_run_in_one_line_and_loses_nothing(place, path, fault, workers, reason):
    place.fail(path, fault, times=10_000, after=18)
    done = place.pretrain("run", workers)
    assert done.returncode == 2, done.stderr
    said = [line for line in done.stderr.splitlines() if not line.startswith("waiting for the Hub")]
    assert len(said) == 1, done.stderr
    assert said[0].startswith("error: shard ")
    assert reason in said[0]
    (checkpoint,) = (place.folder / "run").glob("checkpoint-*")
    assert "the last good checkpoint is run/checkpoint-4. Give the same command to continue" in said[0]
    assert find_defect(checkpoint) is None
    assert done.stderr.count("waiting for the Hub") == (0 if fault in ("noise", 404) else 1)


def test_an_image_that_the_hub_does_not_give_is_not_a_broken_one(place):
    pictures = {f"train/{'ab'[i % 2]}/{i}.png": encoded(i) for i in range(12)}
    pictures["train/a/2.png"] = pictures["train/a/2.png"][:40]
    place.hub.create_dataset("org/folder", pictures)
    code = """
images = images_of("org/folder")
try:
    print(json.dumps([i for batch in read(images, 3) for i in batch]))
except DataError as error:
    print(json.dumps([str(error)]))
print(json.dumps(images.unreadable()))
"""
    (rows, unreadable), said = place.read(code)
    assert set(rows) == set(range(12)) - {2}
    assert len(unreadable) == 1
    for _ in range(2):  # with threads of `datasets` that decode, a worker process once hung
        (shared, _), _ = place.read(code.replace("read(images, 3)", "read(images, 3, workers=2)"))
        assert set(shared) <= set(rows)
        assert len(set(shared)) >= 8  # less than a global batch is left out, and another takes the broken one's place
    before = len(place.hub.ranges)
    place.read(code)
    asked = len(place.hub.ranges) - before
    place.fail("_large", "cut", "short", 503, after=asked - 4)
    (again, unreadable), _ = place.read(code)
    assert again == rows
    assert len(unreadable) == 1
    place.fail("_large", 404, times=1000, after=asked - 4)
    ((error,), unreadable), _ = place.read(code)
    assert "404" in error
    assert "hf://datasets/org/folder@" in error
    assert len(unreadable) <= 1
    place.hub.retry_after = 3600
    place.fail("_large", 429, times=1000, after=asked - 4)
    ((error,), _), said = place.read(code)
    assert "and no more than 4 s are waited for it" in error
    assert "waiting" not in said
