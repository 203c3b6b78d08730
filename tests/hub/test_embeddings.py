"""An embedded set on a Hub: what is sent, what is not, and that plain `datasets` opens it."""

import datasets
import numpy as np
import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError
from PIL import Image
from tiny_models import save_encoder

from training.commands import embed as command

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:httpx")  # and httpx2: the client's own use of them
NAME = "datasets/org/photos-embedded"


@pytest.fixture
def photos(tmp_path):
    random = np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 4)):
        for number in range(count):
            folder = tmp_path / "photos" / split / ("cat", "dog")[number % 2]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(0, 255, (40, 48, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return tmp_path / "photos"


@pytest.fixture
def argv(photos, tmp_path):
    words = [str(save_encoder(tmp_path / "encoder")), "--dataset_name", str(photos), "--image_size", "32"]
    return [*words, "--output_dir", str(tmp_path / "set")]


def test_a_published_set_opens_by_its_name_and_shows_no_place_of_this_machine(hub, argv, tmp_path, capsys):
    command.main([*argv, "--duplicates", "0.5", "--push_to_hub", "org/photos-embedded", "--license", "mit"])
    shown = capsys.readouterr().out
    assert "names of files, such as train/cat/0.png, and the names of 2 classes" in shown
    assert "duplicates_0.5.png shows images, and is left out: --include_pictures publishes it" in shown
    files = hub.files(NAME)
    assert set(files) == {
        *(".gitattributes", "README.md", "embedding.json"),
        *("data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"),
    }
    for name, content in files.items():
        assert str(tmp_path).encode() not in content, name
    card = files["README.md"].decode()
    assert "license: mit" in card
    assert 'load_dataset("org/photos-embedded", split="train")' in card
    (tmp_path / "downloaded" / "data").mkdir(parents=True)
    for name, content in files.items():
        (tmp_path / "downloaded" / name).write_bytes(content)
    found = datasets.load_dataset(str(tmp_path / "downloaded"))
    assert {split: len(rows) for split, rows in found.items()} == {"train": 8, "test": 4}
    assert found["train"].features["label"].names == ["cat", "dog"]

    command.main([*argv, "--push_to_hub", "org/photos-embedded", "--include_pictures", "--license", "mit"])
    assert "duplicates_0.5.png" in hub.files(NAME)
    repo = hub.repos[NAME]
    assert len(repo.log) == 2

    there = repo.commits[repo.branches["main"]]
    there["logo.png"] = there["duplicates_0.5.png"]
    command.main([*argv, "--push_to_hub", "org/photos-embedded"])
    assert {"logo.png", "duplicates_0.5.png"} & hub.files(NAME).keys() == {"logo.png"}


def test_a_private_set_is_seen_by_its_owner_alone_and_a_public_one_does_not_become_private(hub, argv, tmp_path, capsys):
    command.main([*argv, "--push_to_hub", "org/photos-embedded", "--private"])
    assert hub.repos[NAME].private
    assert "data/train-00000-of-00001.parquet" in hub.files(NAME)
    client = HfApi(endpoint=hub.url)
    assert client.dataset_info("org/photos-embedded").private
    with pytest.raises(RepositoryNotFoundError):
        client.dataset_info("org/photos-embedded", token=False)
    command.main([*argv, "--push_to_hub", "org/photos-embedded"])
    assert hub.repos[NAME].private

    hub.create("datasets/org/open")
    with pytest.raises(SystemExit):
        command.main([*argv, "--push_to_hub", "org/open", "--private"])
    assert "private (True) does not change org/open, which is public" in capsys.readouterr().err
    assert not hub.repos["datasets/org/open"].log


def test_a_dry_run_sends_nothing_and_another_dataset_is_not_written_over(hub, argv, capsys):
    command.main([*argv, "--push_to_hub", "org/photos-embedded", "--dry_run"])
    assert "Nothing was uploaded (--dry_run)." in capsys.readouterr().out
    assert not hub.requests
    hub.create_dataset("org/photos-embedded", {"data/train.parquet": b"theirs"})
    with pytest.raises(SystemExit):
        command.main([*argv, "--push_to_hub", "org/photos-embedded"])
    assert "holds something else (data/train.parquet): choose another name" in capsys.readouterr().err
    assert hub.files(NAME)["data/train.parquet"] == b"theirs"


def test_no_repository_is_made_for_a_licence_that_the_hub_does_not_know(hub, argv, tmp_path, capsys):
    with pytest.raises(SystemExit):
        command.main([*argv, "--push_to_hub", "org/photos-embedded", "--license", "mine"])
    assert "license 'mine' is not known" in capsys.readouterr().err
    assert not hub.repos
    assert not (tmp_path / "set").exists()
