"""Sources of images give the same rows; broken files, workers and ranks do not change what an epoch is."""

import io
import logging
import struct
import tarfile
import zlib
from collections import Counter
from itertools import chain
from pathlib import Path

import datasets
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from training.augment import EvaluationView, TwoViews, build_policy
from training.data import DataArguments, images_per_epoch, load_digits, load_images
from training.images import MapImages, StreamedImages, decode_image

IMAGENET_500 = Path(__file__).parents[2] / "shared/data/imagenet-500"
CLASSES = ["cat", "dog", "fox"]
ROWS = 12


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    """No network, and nothing written to or read from the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    # `datasets` sleeps this long after every pass over shuffled parquet files, for the sake of exiting processes.
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.1)
    datasets.disable_progress_bars()


def encoded(i: int, format: str = "PNG") -> bytes:
    """Image number i, which `number` recognises by its colour, also after JPEG."""
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (4 * i, 255 - 4 * i, 90)).save(file, format, quality=100)
    return file.getvalue()


def number(image: Image.Image) -> int:
    return round(image.getpixel((5, 5))[0] / 4)


def table(numbers, image="image", label="label", broken: dict[int, bytes] | None = None) -> datasets.Dataset:
    """Images of these numbers with class number % 3; `broken` bytes take the place of some."""
    images = [{"bytes": (broken or {}).get(i, encoded(i)), "path": f"photo{i}.jpg"} for i in numbers]
    features = datasets.Features({image: datasets.Image(decode=False), label: datasets.ClassLabel(names=CLASSES)})
    return datasets.Dataset.from_dict({image: images, label: [i % 3 for i in numbers]}, features=features)


def write_parquet(folder: Path, shards: list[range], split: str = "train", **columns) -> Path:
    folder.mkdir(exist_ok=True)
    for i, numbers in enumerate(shards):
        rows = table(numbers, **columns)
        rows = rows.cast_column(rows.column_names[0], datasets.Image())
        rows.to_parquet(folder / f"{split}-{i:05d}-of-{len(shards):05d}.parquet")
    return folder


def write_folders(folder: Path) -> Path:
    for split, start in (("train", 0), ("test", ROWS)):
        for i in range(start, start + ROWS):
            path = folder / split / CLASSES[i % 3] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(i))
    return folder


def write_tars(folder: Path) -> Path:
    folder.mkdir()
    for name, numbers in (("train-0", range(6)), ("train-1", range(6, ROWS)), ("test-0", range(ROWS, 2 * ROWS))):
        with tarfile.open(folder / f"{name}.tar", "w") as tar:
            for i in numbers:
                for suffix, content in (("jpg", encoded(i, "JPEG")), ("cls", str(i % 3).encode())):
                    info = tarfile.TarInfo(f"{i:04d}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return folder


def write_source(kind: str, folder: Path) -> Path:
    if kind.startswith("parquet"):
        write_parquet(folder, [range(6), range(6, ROWS)])
        write_parquet(folder, [range(ROWS, 2 * ROWS)], split="test")
        return folder / "train-00000-of-00002.parquet" if kind == "parquet file" else folder
    if kind == "imagefolder":
        return write_folders(folder)
    return write_tars(folder) / ("train-0.tar" if kind == "tar file" else "")


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
@pytest.mark.parametrize("kind", ["parquet folder", "parquet file", "imagefolder", "tar folder", "tar file"])
def test_every_source_gives_the_same_rows(kind, streaming, tmp_path):
    source = write_source(kind, tmp_path / "source")
    splits = load_images(DataArguments(dataset_name=str(source), streaming=streaming))
    rows = list(splits.train)
    assert all(row.keys() == {"image", "label"} and row["image"].keys() == {"bytes", "path"} for row in rows)
    found = sorted((number(decode_image(row["image"])), row["label"]) for row in rows)
    assert found == [(i, i % 3) for i in range(6 if "file" in kind else ROWS)]
    # Not decoded and encoded again on the way, which would cost time and, for JPEG, quality.
    stored = {encoded(i, "JPEG" if kind.startswith("tar") else "PNG") for i in range(ROWS)}
    assert {row["image"]["bytes"] for row in rows} <= stored | {None}
    if "file" in kind:
        assert splits.eval is None
    else:
        held_out = sorted(number(decode_image(row["image"])) for row in splits.eval)
        assert held_out == list(range(ROWS, 2 * ROWS))
    if not kind.startswith("tar"):
        assert splits.class_names == CLASSES
    elif not streaming:  # bare integers: a stream does not know how many classes will come
        assert splits.class_names == ["0", "1", "2"]


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_digits_give_the_same_rows_as_every_source(streaming):
    splits = load_images(DataArguments(dataset_name="digits", streaming=streaming), labelled=True)
    assert splits.class_names == list("0123456789")
    for split, count in ((splits.train, 1437), (splits.eval, 360)):
        rows = list(split)
        assert len(rows) == count
        assert rows[0].keys() == {"image", "label"}
        assert rows[0]["image"].keys() == {"bytes", "path"}
        assert decode_image(rows[0]["image"]).size == (32, 32)


def test_digits_keep_the_share_of_every_class_in_both_splits():
    digits = load_digits()
    train, test = Counter(digits["train"]["label"]), Counter(digits["test"]["label"])
    for label in range(10):
        assert test[label] == pytest.approx((train[label] + test[label]) * 360 / 1797, abs=1)
    assert digits["train"][0]["image"].size == (32, 32)


def test_columns_of_other_names_are_found_by_their_type_or_named(tmp_path):
    source = write_parquet(tmp_path / "named", [range(ROWS)], image="img", label="fine")
    for names in ({}, {"image_column": "img", "label_column": "fine"}):
        splits = load_images(DataArguments(dataset_name=str(source), **names))
        assert splits.train.column_names == ["image", "label"]
        assert splits.class_names == CLASSES
        assert [row["label"] for row in splits.train] == [i % 3 for i in range(ROWS)]


def test_first_samples_are_kept_where_fewer_are_asked_for(tmp_path):
    source = write_parquet(tmp_path / "few", [range(ROWS)])
    write_parquet(source, [range(ROWS, 2 * ROWS)], split="validation")
    args = DataArguments(dataset_name=str(source), max_train_samples=5, max_eval_samples=3)
    splits = load_images(args)
    assert [number(decode_image(row["image"])) for row in splits.train] == list(range(5))
    assert [number(decode_image(row["image"])) for row in splits.eval] == list(range(ROWS, ROWS + 3))


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ({"image_column": "photo"}, ["image_column ('photo')", "it has img, fine, thumb"]),
        ({"image_column": "fine"}, ["image_column ('fine')", "holds no images", "image columns are img, thumb"]),
        ({}, ["2 image columns (img, thumb)", "--image_column"]),
        ({"image_column": "img", "label_column": "coarse"}, ["label_column ('coarse')", "it has img, fine, thumb"]),
        ({"train_split": "unlabeled", "image_column": "img"}, ["train_split ('unlabeled')", "it has train"]),
        ({"eval_split": "dev", "image_column": "img"}, ["eval_split ('dev')", "it has train"]),
        ({"dataset_name": "/no/such/folder"}, ["/no/such/folder", "does not exist: pass a folder"]),
        ({"dataset_name": __file__}, [__file__, "neither .parquet nor .tar: pass the folder"]),
    ],
)
def test_errors_name_the_value_and_a_remedy(flags, parts, tmp_path):
    rows = table(range(3), image="img", label="fine").cast_column("img", datasets.Image())
    thumbs = rows.select_columns("img").rename_column("img", "thumb")
    datasets.concatenate_datasets([rows, thumbs], axis=1).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(ValueError) as error:  # noqa: PT011  (the parts are the match)
        load_images(DataArguments(**{"dataset_name": str(tmp_path)} | flags))
    for part in parts:
        assert part in str(error.value)


def test_labels_and_an_evaluation_split_are_asked_for_by_name(tmp_path):
    rows = table(range(3)).cast_column("image", datasets.Image())
    rows.to_parquet(tmp_path / "labelled.parquet")
    rows.remove_columns("label").to_parquet(tmp_path / "bare.parquet")
    for name, remedy in (("labelled", "--eval_split"), ("bare", "--label_column")):
        args = DataArguments(dataset_name=str(tmp_path / f"{name}.parquet"))
        assert len(load_images(args).train) == 3
        with pytest.raises(ValueError, match=f"{name}.parquet.*{remedy}"):
            load_images(args, labelled=True)


@pytest.mark.parametrize("split", ["train", "test"])
def test_an_empty_split_is_refused_by_name(split, tmp_path):
    for name in ("train", "test"):
        write_parquet(tmp_path / "source", [range(0 if name == split else 3)], split=name)
    with pytest.raises(ValueError, match=f"source.*{split}.* no data"):
        load_images(DataArguments(dataset_name=str(tmp_path / "source")))


def test_sizes_that_would_pad_the_evaluation_crop_are_refused():
    with pytest.raises(ValueError, match=r"eval_resize \(200\) is smaller than image_size \(224\): raise it"):
        DataArguments(eval_resize=200)
    with pytest.raises(ValueError, match=r"image_size \(0\)"):
        DataArguments(image_size=0)
    assert DataArguments().evaluation_view() == EvaluationView(256, 224)


# Decoding


@pytest.mark.parametrize(
    ("mode", "format", "colour", "rgb"),
    [
        ("L", "PNG", 100, (100, 100, 100)),
        ("1", "PNG", 1, (255, 255, 255)),
        ("RGBA", "PNG", (200, 10, 30, 128), (200, 10, 30)),
        ("LA", "PNG", (70, 9), (70, 70, 70)),
        ("P", "GIF", 1, (9, 200, 77)),
        ("CMYK", "TIFF", (0, 255, 255, 0), (255, 0, 0)),
        ("CMYK", "JPEG", (0, 0, 0, 255), (0, 0, 0)),
    ],
)
def test_every_colour_mode_becomes_rgb(mode, format, colour, rgb):
    image = Image.new(mode, (20, 10), colour)
    if mode == "P":
        image.putpalette([0, 0, 0, 9, 200, 77])
    file = io.BytesIO()
    image.save(file, format)
    decoded = decode_image({"bytes": file.getvalue(), "path": None})
    assert (decoded.mode, decoded.size) == ("RGB", (20, 10))
    assert decoded.getpixel((7, 3)) == pytest.approx(rgb, abs=1)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_as_datasets_does(orientation, tmp_path):
    image = Image.effect_mandelbrot((40, 24), (-2, -1, 1, 1), 20).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "turned.jpg", exif=exif)
    row = {"bytes": None, "path": str(tmp_path / "turned.jpg")}
    decoded = decode_image(row)
    assert decoded.size == ((40, 24) if orientation < 5 else (24, 40))
    assert decoded.tobytes() == datasets.Image().decode_example(row).convert("RGB").tobytes()


# Broken files


def broken_files() -> dict[str, bytes]:
    whole = io.BytesIO()
    Image.effect_noise((64, 64), 90).save(whole, "JPEG")
    # A PNG header that announces 60,000 x 60,000 px, which PIL refuses with an error of its own kind.
    bomb = bytearray(encoded(1))
    bomb[16:24] = struct.pack(">II", 60_000, 60_000)
    bomb[29:33] = struct.pack(">I", zlib.crc32(bomb[12:29]))
    return {"garbage": b"\x00not an image" * 20, "truncated": whole.getvalue()[:900], "empty": b"", "bomb": bytes(bomb)}


def pixel(image: Image.Image, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """A transform that keeps which image it is, and one draw."""
    return {"pixel_values": torch.tensor(number(image)), "draw": torch.rand(1, generator=generator)[0]}


def read(images, batch_size: int, workers: int = 0, name: str = "pixel_values", **kwargs) -> list[list]:
    loader = DataLoader(images, batch_size=batch_size, num_workers=workers, **kwargs)
    return [batch[name].tolist() for batch in loader]


@pytest.mark.parametrize("kind", ["garbage", "truncated", "empty", "bomb"])
def test_a_broken_file_is_named_and_counted_and_the_next_image_takes_its_place(kind, caplog):
    images = MapImages(table(range(8), broken=dict.fromkeys((1, 7), broken_files()[kind])), pixel)
    with caplog.at_level(logging.WARNING):
        assert read(images, batch_size=4) == [[0, 2, 2, 3], [4, 5, 6, 0]]
    assert images.skipped == 2
    named = [record.getMessage() for record in caplog.records if record.name == "training.images"]
    assert ["photo1.jpg" in named[0], "photo7.jpg" in named[1], len(named)] == [True, True, 2]


def test_a_broken_file_of_a_folder_is_named_by_its_path(tmp_path, caplog):
    source = write_folders(tmp_path / "folder")
    broken = source / "train" / "dog" / "4.png"
    broken.write_bytes(encoded(4)[:-30])
    images = MapImages(load_images(DataArguments(dataset_name=str(source))).train, pixel)
    with caplog.at_level(logging.WARNING):
        found = Counter(chain(*read(images, batch_size=6)))
    assert sum(found.values()) == ROWS
    assert set(range(ROWS)) - set(found) == {4}
    assert str(broken) in caplog.text


def test_broken_files_met_by_workers_are_counted_in_the_main_process():
    images = MapImages(table(range(8), broken=dict.fromkeys((0, 2), broken_files()["garbage"])), pixel)
    assert read(images, batch_size=4, workers=2) == [[1, 1, 3, 3], [4, 5, 6, 7]]
    assert images.skipped == 2


def rows_of(shards: list[range], broken: dict[int, bytes] | None = None):
    for numbers in shards:
        yield from table(numbers, broken=broken)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_passes_over_broken_files_and_keeps_its_length(workers, tmp_path, caplog):
    broken = dict.fromkeys((2, 9), broken_files()["truncated"])
    if workers:
        shards = {"shards": [range(6), range(6, ROWS)], "broken": broken}
        stream = datasets.IterableDataset.from_generator(rows_of, gen_kwargs=shards)
    else:
        source = write_parquet(tmp_path / "source", [range(ROWS)], broken=broken)
        stream = load_images(DataArguments(dataset_name=str(source), streaming=True)).train
    images = StreamedImages(stream, pixel, images_per_epoch=ROWS, batch_size=3, buffer_size=4)
    with caplog.at_level(logging.WARNING):
        batches = read(images, batch_size=3, workers=workers)
    assert [len(batch) for batch in batches] == [3] * 4
    assert set(chain(*batches)) == set(range(ROWS)) - {2, 9}
    assert 2 <= images.skipped <= 4  # each once, and perhaps again among the two that fill the epoch up
    if not workers:  # the log of a worker process is not this one's
        assert "photo2.jpg" in caplog.text
        assert "photo9.jpg" in caplog.text


def test_a_dataset_without_any_readable_image_is_an_error():
    rows = table(range(3), broken=dict.fromkeys(range(3), b"text"))
    with pytest.raises(ValueError, match="none of the 3 images can be read"):
        MapImages(rows, pixel)[0]
    stream = rows.to_iterable_dataset()
    with pytest.raises(ValueError, match="no image that can be read"):
        next(iter(StreamedImages(stream, pixel, images_per_epoch=3, batch_size=1)))


# Indexed images


def test_views_depend_on_seed_epoch_and_index_alone():
    rows = table(range(ROWS))

    def draws(seed=0, epoch=0, workers=0, order=range(ROWS)):
        images = MapImages(rows, pixel, seed)
        images.set_epoch(epoch)
        found = chain(*read(images, batch_size=5, workers=workers, name="draw", sampler=order))
        return dict(zip(order, found, strict=True))

    first = draws()
    assert len(set(first.values())) == ROWS
    assert draws() == draws(workers=2) == draws(order=range(ROWS)[::-1]) == first
    for other in (draws(seed=1), draws(epoch=1)):
        assert not set(other.values()) & set(first.values())


def test_two_views_are_equal_tensors_with_and_without_workers():
    images = MapImages(table(range(8)), TwoViews(build_policy("v2"), 16), seed=3)
    for alone, worked in zip(
        DataLoader(images, batch_size=4), DataLoader(images, batch_size=4, num_workers=2), strict=True
    ):
        assert alone.keys() == worked.keys() == {"pixel_values", "key_pixel_values"}
        assert all(torch.equal(alone[name], worked[name]) for name in alone)


def test_one_view_comes_with_its_label():
    images = MapImages(table(range(8)), EvaluationView(16, 16))
    assert read(images, batch_size=8, name="labels") == [[i % 3 for i in range(8)]]
    assert len(images.first(3)) == 3
    assert len(images.first(99)) == 8


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_a_new_epoch_reaches_workers_that_are_running(streaming):
    rows = table(range(8))

    def dataset():
        if not streaming:
            return MapImages(rows, pixel)
        return StreamedImages(rows.to_iterable_dataset(num_shards=2), pixel, images_per_epoch=8, batch_size=2)

    running, fresh = dataset(), dataset()
    loader = DataLoader(running, batch_size=2, num_workers=2, persistent_workers=True)
    epochs = []
    for epoch in range(3):
        running.set_epoch(epoch)
        fresh.set_epoch(epoch)
        epochs.append([batch["draw"].tolist() for batch in loader])
        assert epochs[-1] == read(fresh, batch_size=2, workers=2, name="draw")
    assert not set(chain(*epochs[0])) & set(chain(*epochs[1]))


# Streams


EVEN = [range(i, i + 8) for i in range(0, 32, 8)]
UNEVEN = [range(5), range(5, 14), range(14, 32)]


def stream_ranks(shards, ranks: int, workers: int, batch_size=4, epoch=0, seed=0, name="pixel_values") -> list[list]:
    """Batches of every rank in one epoch of 32 images."""
    stream = datasets.IterableDataset.from_generator(rows_of, gen_kwargs={"shards": shards})
    sizes = {"images_per_epoch": 32, "batch_size": batch_size, "world_size": ranks, "buffer_size": 8}
    found = []
    for rank in range(ranks):
        images = StreamedImages(stream, pixel, seed=seed, rank=rank, **sizes)
        images.set_epoch(epoch)
        assert len(images) == 32 // (batch_size * ranks) * batch_size
        found.append(read(images, batch_size, workers, name=name))
    return found


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("ranks", [1, 2])
def test_every_image_of_even_shards_is_seen_once_per_epoch(ranks, workers):
    for epoch in range(2):
        found = stream_ranks(EVEN, ranks, workers, epoch=epoch)
        assert sorted(chain(*chain(*found))) == list(range(32))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("ranks", [1, 2])
def test_every_rank_has_the_same_whole_batches_whatever_the_shards(ranks, workers):
    found = stream_ranks(UNEVEN, ranks, workers, batch_size=5)
    assert [[len(batch) for batch in batches] for batches in found] == [[5] * (32 // (5 * ranks))] * ranks


def test_the_order_of_a_stream_depends_on_seed_and_epoch():
    first = stream_ranks(EVEN, 1, 0)
    assert stream_ranks(EVEN, 1, 0) == first
    assert stream_ranks(EVEN, 1, 0, epoch=1) != first
    assert stream_ranks(EVEN, 1, 0, seed=1) != first
    assert list(chain(*first[0])) != list(range(32))


def test_views_of_a_stream_do_not_depend_on_ranks_and_workers():
    def draws(ranks, workers):
        numbers, values = (
            chain(*chain(*stream_ranks(EVEN, ranks, workers, epoch=1, name=name))) for name in ("pixel_values", "draw")
        )
        return dict(zip(numbers, values, strict=True))

    alone = draws(1, 0)
    assert len(set(alone.values())) == 32
    assert draws(2, 2) == alone


def test_the_length_of_an_epoch_is_what_the_user_or_the_dataset_says(tmp_path):
    source = write_parquet(tmp_path / "source", [range(ROWS)])

    def length(**flags):
        args = DataArguments(dataset_name=str(source), streaming=True, **flags)
        return images_per_epoch(load_images(args).train, args)

    with pytest.raises(ValueError, match=r"source does not say how many images it has: pass --max_train_samples"):
        length()
    assert length(max_train_samples=7) == 7
    (source / "README.md").write_text(
        "---\ndataset_info:\n  features:\n  - name: image\n    dtype: image\n  - name: label\n    dtype: int64\n"
        "  splits:\n  - name: train\n    num_bytes: 4000\n    num_examples: 12\n---\n"
    )
    assert length() == ROWS
    assert length(max_train_samples=7) == 7


@pytest.mark.skipif(not IMAGENET_500.is_dir(), reason="needs ../shared/data/imagenet-500")
def test_imagenet_streams_views_at_224_px():
    args = DataArguments(dataset_name=str(IMAGENET_500), streaming=True)
    views = TwoViews(build_policy(args.augmentation), args.image_size)
    images = StreamedImages(load_images(args).train, views, images_per_epoch=20, batch_size=10, buffer_size=20)
    batches = list(DataLoader(images, batch_size=10))
    assert [batch["key_pixel_values"].shape for batch in batches] == [(10, 3, 224, 224)] * 2
    assert images.skipped == 0
    assert batches[0]["pixel_values"].float().std() > 30
