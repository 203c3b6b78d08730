"""An output directory belongs to one run, on one dataset."""

import pytest
import yaml
from parsed_recipes import CPU, LAYOUT

from training.engine.checkpoints import write_manifest
from training.recipe import parse_pretrain


def test_a_fresh_directory_gets_a_recipe_that_repeats_the_run(claim, tmp_path):
    assert claim("--queue_size", "512", "--per_device_train_batch_size", "64") is None
    args = parse_pretrain(["--temperature", "0.2", "--queue_size", "512", "--per_device_train_batch_size", "64", *CPU])
    again = parse_pretrain(["--recipe", str(tmp_path / "run" / "recipe.yaml"), *CPU])
    assert again.about == args.about
    assert again.config.to_dict() == args.config.to_dict()
    assert again.data == args.data
    assert again.settings == args.settings
    assert again.training.global_batch_size == 64


def test_the_same_settings_continue_from_the_newest_checkpoint(claim, tmp_path):
    assert claim() is None
    before = (tmp_path / "run" / "recipe.yaml").read_bytes()
    assert claim() is None
    for step in (9, 10, 100):
        (tmp_path / "run" / f"checkpoint-{step}").mkdir()
        write_manifest(tmp_path / "run" / f"checkpoint-{step}", LAYOUT)
    assert claim() == str(tmp_path / "run" / "checkpoint-100")
    # How fast the images are read and what is printed do not make another run.
    assert claim("--dataloader_num_workers", "2", "--logging_steps", "3") == str(tmp_path / "run" / "checkpoint-100")
    assert (tmp_path / "run" / "recipe.yaml").read_bytes() == before


@pytest.mark.parametrize(
    "flags",
    [
        ["--per_device_eval_batch_size", "7", "--eval_every_n_epochs", "5", "--ddp_timeout", "99"],
        ["--save_strategy", "steps", "--save_steps", "3"],
        ["--eval_strategy", "no", "--save_strategy", "steps", "--dataloader_prefetch_factor", "4"],
        ["--seed", "0", "--weight_decay", "0.0005", "--queue_size", "1024"],  # what neither gave, or the recipe gives
    ],
)
def test_what_changes_no_weight_does_not_stand_in_the_way(flags, claim, tmp_path):
    claim()
    (tmp_path / "run" / "checkpoint-9").mkdir()
    write_manifest(tmp_path / "run" / "checkpoint-9", LAYOUT)
    assert claim(*flags) == str(tmp_path / "run" / "checkpoint-9")


def test_a_folder_of_images_is_the_same_by_any_of_its_paths(claim, tmp_path, monkeypatch):
    (tmp_path / "base").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    claim("--dataset_name", "base")
    (tmp_path / "run" / "checkpoint-9").mkdir()
    write_manifest(tmp_path / "run" / "checkpoint-9", LAYOUT)
    for path in ("base/", "./base", str(tmp_path / "base"), "link", "other/../base"):
        assert claim("--dataset_name", path) == str(tmp_path / "run" / "checkpoint-9")
    for path in ("other", "basis"):
        with pytest.raises(ValueError, match=f"another run: dataset_name is .*base there and .*{path} here"):
            claim("--dataset_name", path)


@pytest.mark.parametrize(
    ("then", "now"), [("digits", "./digits"), ("org/photos", "org/photos"), ("./digits", "digits")]
)
def test_a_folder_is_not_the_dataset_of_its_name_on_the_hub_or_built_in(then, now, claim, tmp_path, monkeypatch):
    """A run went on with the images of the folder, if it had as many."""
    monkeypatch.chdir(tmp_path)
    if then.startswith("."):
        (tmp_path / then).mkdir()
    claim("--dataset_name", then)
    (tmp_path / "run" / "checkpoint-9").mkdir()
    (tmp_path / now).mkdir(parents=True, exist_ok=True)
    with pytest.raises(ValueError, match="another run: dataset_name is "):
        claim("--dataset_name", now)


def test_a_dataset_that_was_moved_behind_a_link_is_compared_with_what_it_was(claim, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    content = {"train": "12 images 1"}
    claim("--dataset_name", str(photos), place={"dataset": str(photos), "content": content})
    (tmp_path / "run" / "checkpoint-9").mkdir()
    photos.rename(tmp_path / "moved")
    photos.symlink_to(tmp_path / "moved")
    moved = {"dataset": str(tmp_path / "moved"), "content": content}
    assert claim("--dataset_name", str(photos), place=moved) is None
    with pytest.raises(ValueError, match="split 'train' was 12 images 1 and is 12 images 2"):
        claim("--dataset_name", str(photos), place=moved | {"content": {"train": "12 images 2"}})


def test_another_probe_section_of_a_recipe_does_not_make_another_run(claim, tmp_path):
    claim()
    path = tmp_path / "run" / "recipe.yaml"
    recipe = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump(recipe | {"probe": {"learning_rate": 7.0}}))
    (tmp_path / "run" / "checkpoint-9").mkdir()
    write_manifest(tmp_path / "run" / "checkpoint-9", LAYOUT)
    assert claim() == str(tmp_path / "run" / "checkpoint-9")


@pytest.mark.parametrize(
    ("flags", "difference"),
    [
        (["--queue_size", "512"], "queue_size is 1024 there and 512 here"),
        (["--max_train_samples", "99"], "max_train_samples is None there and 99 here"),
        (["--learning_rate", "0.5"], "learning_rate is 0.06 there and 0.5 here"),
        (["--seed", "1"], "seed is 0 there and 1 here"),
        # Results name them beside numbers that the run has logged before.
        (["--knn_temperature", "0.2"], "knn_temperature is 0.07 there and 0.2 here"),
        (["--knn_bank_size", "9"], "knn_bank_size is None there and 9 here"),
        (["--knn_features", "head"], "knn_features is backbone there and head here"),
    ],
)
def test_other_settings_are_refused_by_their_name(flags, difference, claim, tmp_path):
    claim()
    (tmp_path / "run" / "checkpoint-1").mkdir()
    before = (tmp_path / "run" / "recipe.yaml").read_bytes()
    with pytest.raises(ValueError, match=f"another run: {difference}.*--output_dir"):
        claim(*flags)
    assert (tmp_path / "run" / "recipe.yaml").read_bytes() == before


def test_a_run_that_crashed_before_its_first_checkpoint_does_not_stand_in_the_way(claim, tmp_path):
    claim()
    claim("--queue_size", "512")
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["model"]["queue_size"] == 512


def test_a_run_goes_on_with_the_images_that_it_was_begun_with(claim, tmp_path):
    then = {"dataset": "/data/birds", "content": {"train": "12 images aa", "test": "3 images bb"}}
    claim(place=then)
    (tmp_path / "run" / "checkpoint-1").mkdir()
    write_manifest(tmp_path / "run" / "checkpoint-1", LAYOUT)
    assert claim(place=then) is not None
    now = {"dataset": "/data/birds", "content": {"train": "13 images cc", "test": "3 images bb"}}
    with pytest.raises(ValueError, match="split 'train' was 12 images aa and is 13 images cc"):
        claim(place=now)


@pytest.mark.parametrize("linked", [False, True])
def test_a_run_does_not_lie_in_its_dataset(linked, claim, tmp_path):
    """Or the next one would train on its figures, and no evaluation would find the images that it has seen."""
    photos = tmp_path / "photos"
    (photos / "a").mkdir(parents=True)
    folder = photos / "a" / "run"
    if linked:
        (tmp_path / "link").symlink_to(photos / "a")
        folder = tmp_path / "link" / "run"
    place = {"dataset": str(photos), "content": {"train": "1 images 0"}}
    with pytest.raises(ValueError, match=f"^{folder} lies in {photos}, and would be read as part of it"):
        claim(folder=folder, place=place)
    assert not folder.exists()
    claim(folder=tmp_path / "photos_run", place=place)


def test_files_of_something_else_are_left_alone(claim, tmp_path):
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "chapter1.tex").write_text("words")
    for path in (folder, folder / "chapter1.tex"):
        with pytest.raises(ValueError, match=r"holds files of something else: pass another --output_dir"):
            claim(folder=path)
    assert [path.name for path in folder.iterdir()] == ["chapter1.tex"]
    assert (folder / "chapter1.tex").read_text() == "words"
