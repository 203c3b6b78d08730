"""Datasets of strangers that lie on a Hub: looked at there, before anything is read."""

import io
import json
import re
import subprocess
import sys
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest
from bombs import DATASETS, MANY, write_rows
from hub_server import Hub, environment
from numbered_images import CLASSES, encoded, table

pytestmark = pytest.mark.slow  # local files of the same kinds are in tests/data/test_strangers.py
SUPPORT = Path(__file__).parents[1] / "support"
# The client keeps the address of its Hub from the import on, so that a process of its own opens the datasets.
OPEN = """
import json, resource, sys
from numbered_images import number
from training.data.sources import DataArguments, load_images

DOWNLOADED = ("org/parquet", "org/folder", "org/compressed_member", "org/zip_bomb")  # too; each takes a second

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

for name in sys.argv[1:]:
    for streaming in (True, False) if name in DOWNLOADED else (True,):
        before = peak()
        try:
            splits = load_images(DataArguments(dataset_name=name, streaming=streaming))
            said = [number(splits.decoder.image(row["image"])) for row in splits.train]
        except ValueError as error:
            said = str(error)
        print(json.dumps([name, said, peak() - before]))
"""


def zipped(files: dict[str, bytes]) -> bytes:
    with zipfile.ZipFile(file := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return file.getvalue()


def card(data_files: str) -> bytes:
    return f"---\nconfigs:\n- config_name: default\n  data_files: {data_files}\n---\n".encode()


PICTURES = {f"train/{'ab'[i % 2]}/{i}.png": encoded(i) for i in range(12)}
BOMBS = {f"org/{make.__name__}": reason for reason, make in DATASETS.items()} | {"org/zip_bomb": "unpacks to"}


def fill(hub: Hub, folder: Path) -> None:
    rows = write_rows(folder / "rows", [{"bytes": encoded(i), "path": None} for i in range(12)])
    hub.create_dataset("org/parquet", {"data/train-00000.parquet": (rows / "train.parquet").read_bytes()})
    hub.create_dataset("org/zip", {"data.zip": zipped({Path(name).name: data for name, data in PICTURES.items()})})
    hub.create_dataset("org/folder", PICTURES)
    for make in DATASETS.values():
        (file,) = make(folder / make.__name__).iterdir()
        hub.create_dataset(f"org/{make.__name__}", {f"data/{file.name}": file.read_bytes()})
    hub.create_dataset("org/zip_bomb", {"data.zip": zipped(PICTURES | {"train/a/99.png": bytes(MANY)})})
    (folder / "private.png").write_bytes(encoded(5))
    hub.create_dataset("org/names_local", {"README.md": card(f'"{folder}/*.png"')})
    hub.create_dataset("org/names_other", {"README.md": card('"hf://datasets/org/folder/train/a/*.png"')})


@pytest.fixture(scope="module")
def opened(tmp_path_factory) -> Iterator[dict[str, list[tuple[list[int] | str, int]]]]:
    """Of each dataset, streamed and downloaded: the numbers of its images or why it was not opened, and bytes of memory."""
    folder = tmp_path_factory.mktemp("strange")
    fill(hub := Hub(), folder)
    env = environment(hub, folder / "cache") | {"NO_PROXY": "127.0.0.1,localhost"}
    command = [sys.executable, "-W", "ignore", "-c", OPEN, *(name.removeprefix("datasets/") for name in hub.repos)]
    env["PYTHONPATH"] = f"{SUPPORT}:{SUPPORT.parents[1]}"
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    hub.close()
    assert done.returncode == 0, done.stderr
    answers = defaultdict(list)
    for line in done.stdout.splitlines():
        if line.startswith("["):
            name, said, memory = json.loads(line)
            answers[name].append((said, memory))
    yield answers
    for place in (folder / "cache").rglob("*"):
        assert not place.is_file() or place.stat().st_size < 2**20


def test_what_is_small_and_whole_is_read(opened):
    for name, times in {"org/parquet": 2, "org/zip": 1, "org/folder": 2}.items():
        assert [sorted(numbers) for numbers, _ in opened[name]] == [list(range(12))] * times


@pytest.mark.parametrize("name", BOMBS)
def test_what_would_fill_the_memory_is_refused(opened, name):
    assert len(opened[name]) == (2 if name in ("org/compressed_member", "org/zip_bomb") else 1)
    for said, memory in opened[name]:
        assert re.search(BOMBS[name], said)
        assert memory < 100 * 2**20


@pytest.mark.parametrize("name", ["org/names_local", "org/names_other"])
def test_a_card_names_no_files_outside_its_repository(opened, name):
    assert opened[name]
    for said, _ in opened[name]:
        assert "don't belong to org/" in said


def test_files_that_name_one_class_number_differently_are_refused_where_labels_are_read(tmp_path):
    code = """
from training.data.sources import DataArguments, SplitDataArguments, load_images, load_splits

for name in ("org/same", "org/other"):
    print(load_images(DataArguments(dataset_name=name)).label_problem)
    try:
        print(load_splits(SplitDataArguments(dataset_name=name)).class_names)
    except ValueError as error:
        print(error)
"""
    hub = Hub()
    for name, test in (("same", CLASSES), ("other", CLASSES[1:])):
        files = {}
        for split, classes in (("train", CLASSES), ("test", test)):
            rows = table(range(6)).remove_columns("label").add_column("label", [0, 1] * 3)
            rows = rows.cast_column("label", datasets.ClassLabel(names=classes))
            rows.cast_column("image", datasets.Image()).to_parquet(file := io.BytesIO())
            files[f"data/{split}-00000-of-00001.parquet"] = file.getvalue()
        hub.create_dataset(f"org/{name}", files)
    env = environment(hub, tmp_path / "cache") | {"NO_PROXY": "127.0.0.1,localhost"}
    env["PYTHONPATH"] = f"{SUPPORT}:{SUPPORT.parents[1]}"
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    hub.close()
    said = [line for line in done.stdout.splitlines() if not line.startswith("org/")]
    assert said[:2] == ["None", str(CLASSES)], done.stderr
    assert len(said) == 4
    for line in said[2:]:
        assert re.match("class 0 is 'cat' in .*train-00000-of-00001.parquet and 'dog' in .*test-00000-of-00001", line)


def test_a_dataset_that_is_read_offline_is_of_the_commit_in_the_cache(tmp_path):
    code = """
import json, sys
from training.data.sources import DataArguments, load_images

args = DataArguments(dataset_name="org/rows")
args.content = json.loads(sys.argv[1])
splits = load_images(args)
print(json.dumps([splits.about["revision"], splits.place["content"]]))
"""

    def parquet(count: int) -> bytes:
        table(range(count)).cast_column("image", datasets.Image()).to_parquet(file := io.BytesIO())
        return file.getvalue()

    hub = Hub()
    repo = hub.create_dataset("org/rows", {"data/train-00000-of-00001.parquet": parquet(6)})
    env = environment(hub, tmp_path / "cache") | {"NO_PROXY": "127.0.0.1,localhost"}
    env["PYTHONPATH"] = f"{SUPPORT}:{SUPPORT.parents[1]}"

    def opened(content=None, **more: str):
        command = [sys.executable, "-W", "ignore", "-c", code, json.dumps(content)]
        done = subprocess.run(command, env=env | more, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    first = repo.branches["main"]
    assert opened() == [f"commit {first}", {"train": f"commit {first}"}]
    second = hub.push("org/rows", {"data/train-00000-of-00001.parquet": parquet(5)})
    requests = len(hub.requests)
    assert opened(HF_HUB_OFFLINE="1") == [f"commit {first}", {"train": f"commit {first}"}]
    assert opened({"train": f"commit {first}"}, HF_HUB_OFFLINE="1")[0] == f"commit {first}"
    assert len(hub.requests) == requests
    assert opened()[0] == f"commit {second}"
    hub.close()
