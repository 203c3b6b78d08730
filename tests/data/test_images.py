"""Broken files, workers, ranks and resuming do not change what an epoch is, nor which views an image has."""

import io
import logging
import multiprocessing
import os
import resource
import struct
import tarfile
import zlib
from collections import Counter
from itertools import chain
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from numbered_images import ROWS, encoded, pixel, read, stream, table, write_folders, write_parquet
from PIL import Image, TiffImagePlugin
from torch.utils.data import DataLoader
from transformers.image_utils import load_image

from modeling_moco import MoCoImageProcessor, MoCoImageProcessorPil
from training.data.decode import Decoder, decode_image, decode_tensor
from training.data.images import MapImages, StreamedImages
from training.data.sources import DataArguments, ImageSplits, load_images
from training.views.pil import EvaluationView, Views
from training.views.policy import build_policies

IMAGENET = os.environ.get("MOCO_IMAGENET")  # a folder of parquet files with photographs

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
    decoded = Decoder(places=(f"{tmp_path}/",)).image(row)
    assert decoded.size == ((40, 24) if orientation < 5 else (24, 40))
    assert decoded.tobytes() == datasets.Image().decode_example(row).convert("RGB").tobytes()


UPRIGHT = {  # by the orientation, as EXIF defines it: where the first row and the first column are
    **{1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1]},
    **{5: lambda a: a.swapaxes(0, 1), 6: lambda a: a[::-1].swapaxes(0, 1)},
    **{7: lambda a: a[::-1, ::-1].swapaxes(0, 1), 8: lambda a: a[:, ::-1].swapaxes(0, 1)},
}
STORED = {
    "JPEG": ("JPEG", {"quality": 95}),
    "PNG": ("PNG", {}),
    "WEBP": ("WEBP", {"lossless": True}),
    "TIFF": ("TIFF", {}),
    "compressed TIFF": ("TIFF", {"compression": "tiff_lzw"}),
    "TIFF with XMP": ("TIFF", {}),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("kind", STORED)
def test_size_image_tensor_and_mask_are_turned_alike(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    format, options = STORED[kind]
    turned = {"tiffinfo": {700: b'<x tiff:Orientation="%d"/>' % orientation}} if "XMP" in kind else {"exif": exif}
    grey = Image.effect_mandelbrot((40, 24), (-2, -1, 1, 0.5), 20)  # no mirror image of itself
    for image in (grey, Image.merge("RGB", [grey, grey.transpose(Image.Transpose.ROTATE_180), grey])):
        plain, row = ({"bytes": saved(image, format, **options, **how), "path": None} for how in ({}, turned))
        upright = UPRIGHT[orientation](np.asarray(decode_image(plain)))
        assert np.array_equal(np.asarray(decode_image(row)), upright)
        assert np.abs(decode_tensor(row).permute(1, 2, 0).numpy() - upright.astype(int)).max() <= 4  # two JPEG decoders
        assert Decoder().size(row) == upright.shape[1::-1]
    if format in ("PNG", "TIFF"):  # the others lose numbers, or have no grey
        numbers = {"bytes": saved(grey, format, **options, **turned), "path": None}
        assert np.array_equal(Decoder().mask(numbers), UPRIGHT[orientation](np.asarray(grey)))


@pytest.mark.parametrize(("kind", "value"), [(2, '<x tiff:Orientation="6"/>'), (3, 60)], ids=["text", "number"])
def test_an_orientation_that_pil_cannot_read_costs_one_image(kind, value):
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags.tagtype[700], tags[700] = kind, value  # XMP, which is to be bytes
    row = {"bytes": saved(Image.new("L", (8, 6)), "TIFF", tiffinfo=tags), "path": None}
    for decode in (decode_image, decode_tensor, Decoder().size, Decoder().mask):
        with pytest.raises(OSError, match=r"pattern|bytes-like"):
            decode(row)


# Kinds of pixels


def sixteen_bits() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 2**16, (24, 32), dtype=np.uint16)


def saved(image: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


GREY = {
    "png": lambda: saved(Image.fromarray(sixteen_bits()), "PNG"),
    "tiff": lambda: saved(Image.fromarray(sixteen_bits()), "TIFF"),
    "tiff, big-endian": lambda: saved(Image.fromarray(sixteen_bits().astype(">u2")), "TIFF"),
    "pgm": lambda: saved(Image.fromarray(sixteen_bits()), "PPM"),
    "jpeg 2000": lambda: saved(Image.fromarray(sixteen_bits()), "JPEG2000"),
}


@pytest.mark.parametrize("kind", GREY)
def test_sixteen_bits_of_grey_are_scaled_to_eight_everywhere(kind):
    row = {"bytes": GREY[kind](), "path": None}
    expected = np.rint(sixteen_bits().astype(np.float64) / 257)
    decoded = np.asarray(decode_image(row)).astype(int)
    assert decoded.shape == (24, 32, 3)
    assert abs(decoded - expected[..., None]).max() <= 0.5
    assert np.array_equal(decode_tensor(row).permute(1, 2, 0).numpy(), decoded)
    for processor in (MoCoImageProcessor, MoCoImageProcessorPil):
        plain = processor(do_resize=False, do_center_crop=False, do_normalize=False, do_rescale=False)
        opened = Image.open(io.BytesIO(row["bytes"]))
        pixels = torch.as_tensor(plain(opened, return_tensors="pt")["pixel_values"][0])
        assert np.array_equal(pixels.permute(1, 2, 0).numpy(), decoded)


def test_a_tiff_that_states_its_bits_is_scaled_by_them():
    twelve = sixteen_bits() >> 4
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[281] = 4095  # MaxSampleValue
    row = {"bytes": saved(Image.fromarray(twelve), "TIFF", tiffinfo=tags), "path": None}
    decoded = np.asarray(decode_image(row))[..., 0]
    assert abs(decoded - twelve.astype(np.float64) * 255 / 4095).max() <= 0.5


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_levels_of_32_bits_are_refused_by_name(kind):
    row = {"bytes": saved(Image.fromarray(sixteen_bits().astype(kind)), "TIFF"), "path": None}
    for decode in (decode_image, decode_tensor):
        with pytest.raises(OSError, match="grey levels of 32 bits have no known range"):
            decode(row)
    for processor in (MoCoImageProcessor, MoCoImageProcessorPil):
        with pytest.raises(ValueError, match="grey levels of 32 bits have no known range"):
            processor()(Image.fromarray(sixteen_bits().astype(kind)))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_dropped_as_the_pipelines_drop_it(mode):
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 256, (16, 16, 4), dtype=np.uint8), "RGBA")
    image = noise.convert("RGB").quantize(16) if mode == "P" else noise.convert(mode)
    options = {"transparency": 3} if mode == "P" else {}
    row = {"bytes": saved(image, "PNG", **options), "path": None}
    expected = np.asarray(load_image(Image.open(io.BytesIO(row["bytes"]))))  # what pipelines decode
    assert np.array_equal(np.asarray(decode_image(row)), expected)
    for processor in (MoCoImageProcessor, MoCoImageProcessorPil):
        plain = processor(do_resize=False, do_center_crop=False, do_normalize=False, do_rescale=False)
        pixels = plain(Image.open(io.BytesIO(row["bytes"])), return_tensors="pt")["pixel_values"][0]
        assert np.array_equal(torch.as_tensor(pixels).permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("size", [(20_000, 1), (1, 5_000)])
def test_a_line_of_pixels_is_no_image_for_any_decoder(size):
    row = {"bytes": saved(Image.new("RGB", size), "PNG"), "path": None}
    jpeg = {"bytes": saved(Image.new("RGB", size), "JPEG"), "path": None}
    for decode, image in ((decode_image, row), (decode_tensor, row), (decode_tensor, jpeg)):
        with pytest.raises(OSError, match=f"{size[0]} x {size[1]} pixels"):
            decode(image)


def write_pictures(folder: Path, pictures: list[Image.Image]) -> str:
    (folder / "train" / "a").mkdir(parents=True)
    for i, picture in enumerate(pictures):
        picture.save(folder / "train" / "a" / f"{i:02}.png")
    return str(folder)


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_pictures_without_content_are_named_before_anything_is_trained(tmp_path, capsys, streaming):
    noise = [Image.effect_noise((16, 16), 90) for _ in range(4)]
    flat = [Image.new("L", (16, 16), i) for i in range(4)]
    dark = [Image.fromarray(sixteen_bits() >> 8)] * 3  # 8 bits in 16: 1 grey level of 255
    dim = [Image.fromarray(sixteen_bits() >> 4)] * 3  # 12 bits in 16: 16 grey levels
    for name, pictures, message in (
        ("flat", flat, "each of the 4 images looked at in split 'train' is of one colour, or nearly"),
        ("dark", dark, "each of the 3 images looked at in split 'train' is of one colour, or nearly"),
        ("dim", dim, "each of the 3 images looked at in split 'train' is of one colour, or nearly .*12 bits in 16"),
        ("alike", noise[:1] * 3, "all of the 3 images looked at in split 'train' are alike"),
    ):
        with pytest.raises(ValueError, match=message):
            load_images(DataArguments(dataset_name=write_pictures(tmp_path / name, pictures), streaming=streaming))
    capsys.readouterr()
    load_images(DataArguments(dataset_name=write_pictures(tmp_path / "some", noise + flat), streaming=streaming))
    warning = capsys.readouterr().out.splitlines()[1]
    assert warning.startswith("warning: 4 of the 8 images looked at in split 'train' are of one colour, or nearly")
    assert "04.png" in warning


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_a_row_without_an_image_is_named_and_passed_over(streaming, tmp_path, caplog):
    rows = table(range(8)).map(lambda row, i: {"image": None if i in (2, 5) else row["image"]}, with_indices=True)
    rows.cast_column("image", datasets.Image()).to_parquet(tmp_path / "train.parquet")
    source = load_images(DataArguments(dataset_name=str(tmp_path), streaming=streaming)).train
    images = StreamedImages(source, pixel, batch_size=4) if streaming else MapImages(source, pixel)
    assert set(chain(*read(images, batch_size=4))) == set(range(8)) - {2, 5}
    assert images.unreadable() == ["row 2", "row 5"]


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_images_of_a_tar_in_another_column_are_named_and_passed_over(streaming, tmp_path):
    """`datasets` takes the columns of a tar from its first samples."""
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        for i in range(8):
            kind = "jpg" if i < 6 else "png"
            content = encoded(i, "JPEG" if i < 6 else "PNG")
            info = tarfile.TarInfo(f"{i:04d}.{kind}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    source = load_images(DataArguments(dataset_name=str(tmp_path), streaming=streaming)).train
    images = StreamedImages(source, pixel, batch_size=4) if streaming else MapImages(source, pixel)
    assert set(chain(*read(images, batch_size=4))) == set(range(6))
    assert images.unreadable() == ["row 6", "row 7"]


# Broken files


def broken_files() -> dict[str, bytes]:
    whole = io.BytesIO()
    Image.effect_noise((64, 64), 90).save(whole, "JPEG")
    # A PNG header that announces 60,000 x 60,000 px, which PIL refuses with an error of its own kind.
    bomb = bytearray(encoded(1))
    bomb[16:24] = struct.pack(">II", 60_000, 60_000)
    bomb[29:33] = struct.pack(">I", zlib.crc32(bomb[12:29]))
    return {"garbage": b"\x00not an image" * 20, "truncated": whole.getvalue()[:900], "empty": b"", "bomb": bytes(bomb)}


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_several_frames_or_pages_the_first_is_read(format):
    first, second = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    file = io.BytesIO()
    first.save(file, format, save_all=True, append_images=[second])
    row = {"bytes": file.getvalue(), "path": None}
    red = np.array([255, 0, 0])
    assert np.abs(np.asarray(decode_image(row)) - red).max() <= 1
    assert np.abs(decode_tensor(row).permute(1, 2, 0).numpy() - red).max() <= 1


@pytest.mark.parametrize("kind", ["garbage", "truncated", "empty", "bomb"])
def test_a_broken_file_is_named_and_counted_and_the_next_image_takes_its_place(kind, caplog):
    images = MapImages(table(range(8), broken=dict.fromkeys((1, 7), broken_files()[kind])), pixel)
    with caplog.at_level(logging.WARNING):
        assert read(images, batch_size=4) == [[0, 2, 2, 3], [4, 5, 6, 0]]
    assert images.unreadable() == ["photo1.jpg", "photo7.jpg"]
    named = [record.getMessage() for record in caplog.records if record.name == "training.data.decode"]
    assert ["photo1.jpg" in named[0], "photo7.jpg" in named[1], len(named)] == [True, True, 2]
    assert "object at" not in named[0]  # of PIL's words, which name what is nowhere


def test_a_broken_file_of_a_folder_is_named_by_its_path(tmp_path, caplog):
    source = write_folders(tmp_path / "folder")
    broken = source / "train" / "dog" / "4.png"
    broken.write_bytes(encoded(4)[:-30])
    splits = load_images(DataArguments(dataset_name=str(source)))
    images = MapImages(splits.train, pixel, decode=splits.decoder.image)
    with caplog.at_level(logging.WARNING):
        found = Counter(chain(*read(images, batch_size=6)))
    assert sum(found.values()) == ROWS
    assert set(range(ROWS)) - set(found) == {4}
    assert str(broken) in caplog.text


def test_views_of_one_split_name_its_broken_rows_by_their_numbers_there_and_once(tmp_path, caplog):
    rows = table(range(12)).map(lambda row, i: {"image": None if i in (4, 9) else row["image"]}, with_indices=True)
    rows = rows.map(lambda row: {"image": row["image"] and {"bytes": row["image"]["bytes"], "path": None}})
    splits = ImageSplits(rows, rows, [], about={"split": "test"})
    view = EvaluationView(16, 16)
    some = splits.train_in(view).select(range(2, 12)).evenly_spaced(5)  # rows 2, 4, 6, 8, 10
    with caplog.at_level(logging.WARNING):
        assert [some.read(i) is None for i in range(5)] == [False, True, False, False, False]
        whole = splits.train_in(view)
        for images in (whole, splits.eval_in(view)):
            assert sum(images.read(i) is None for i in range(12)) == 2
    named = [record.getMessage().split(": ")[1].split(" (")[0] for record in caplog.records]
    assert named == ["row 4", "row 9", "row 4 of test", "row 9 of test"]
    assert (some.unreadable(), whole.unreadable()) == (["row 4"], ["row 4", "row 9"])


def test_broken_files_met_by_workers_are_counted_in_the_main_process():
    images = MapImages(table(range(8), broken=dict.fromkeys((0, 2), broken_files()["garbage"])), pixel)
    assert read(images, batch_size=4, workers=2) == [[1, 1, 3, 3], [4, 5, 6, 7]]
    assert images.unreadable() == ["photo0.jpg", "photo2.jpg"]


def test_a_dataset_without_any_readable_image_is_an_error():
    rows = table(range(3), broken=dict.fromkeys(range(3), b"text"))
    with pytest.raises(ValueError, match="none of the 3 images can be read"):
        MapImages(rows, pixel)[0]
    for skip in (0, 2):
        images = StreamedImages(stream([range(3)], broken=dict.fromkeys(range(3), b"text")), pixel, batch_size=1)
        images.set_epoch(0, skip_batches=skip)
        with pytest.raises(ValueError, match="no image that can be read"):
            list(images)


# Indexed images


def test_views_depend_on_seed_epoch_and_index_alone():
    rows = table(range(ROWS))

    def random_numbers(seed=0, epoch=0, workers=0, order=range(ROWS)):
        images = MapImages(rows, pixel, seed)
        images.set_epoch(epoch)
        found = chain(*read(images, batch_size=5, workers=workers, name="random", sampler=order))
        return dict(zip(order, found, strict=True))

    first = random_numbers()
    assert len(set(first.values())) == ROWS
    assert random_numbers() == random_numbers(workers=2) == random_numbers(order=range(ROWS)[::-1]) == first
    for other in (random_numbers(seed=1), random_numbers(epoch=1)):
        assert not set(other.values()) & set(first.values())


def test_two_views_are_equal_tensors_with_and_without_workers():
    images = MapImages(table(range(8)), Views(build_policies("v2"), 16), seed=3)
    for alone, worked in zip(
        DataLoader(images, batch_size=4), DataLoader(images, batch_size=4, num_workers=2), strict=True
    ):
        assert alone.keys() == worked.keys() == {"pixel_values", "key_pixel_values"}
        assert all(torch.equal(alone[name], worked[name]) for name in alone)


def test_one_view_comes_with_its_label():
    images = MapImages(table(range(8)), EvaluationView(16, 16))
    assert read(images, batch_size=8, name="labels") == [[i % 3 for i in range(8)]]
    assert len(images.rows(0, 3)) == 3
    assert len(images.rows(0, 99)) == 8


@pytest.mark.parametrize("count", [1, 3, 5, 7, 8, 99])
def test_spread_images_have_equal_distances_up_to_the_end(count):
    images = MapImages(table(range(8)), EvaluationView(16, 16))
    everything = [row["image"]["bytes"] for row in images.source]
    chosen = [everything.index(row["image"]["bytes"]) for row in images.evenly_spaced(count).source]
    assert len(set(chosen)) == min(count, 8)
    gaps = [after - before for before, after in zip(chosen, [*chosen[1:], 8], strict=True)]
    assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_a_new_epoch_reaches_workers_that_are_running(streaming):
    rows = table(range(8))

    def dataset():
        if not streaming:
            return MapImages(rows, pixel)
        return StreamedImages(stream([range(4), range(4, 8)]), pixel, batch_size=2)

    running, fresh = dataset(), dataset()
    loader = DataLoader(running, batch_size=2, num_workers=2, persistent_workers=True)
    epochs = []
    for epoch in range(3):
        running.set_epoch(epoch)
        fresh.set_epoch(epoch)
        epochs.append([batch["random"].tolist() for batch in loader])
        assert epochs[-1] == read(fresh, batch_size=2, workers=2, name="random")
    assert not set(chain(*epochs[0])) & set(chain(*epochs[1]))


# Streams

SHARDS = {
    "even": [range(i, i + 8) for i in range(0, 32, 8)],
    "uneven": [range(5), range(5, 5), range(5, 14), range(14, 32)],
    "one": [range(32)],
}


def stream_ranks(shards, ranks=1, workers=0, batch_size=4, epoch=0, skip=0, seed=0, broken=None) -> list[list]:
    """Batches of (number, random) of every rank in one epoch."""
    found = []
    for rank in range(ranks):
        images = StreamedImages(
            stream(shards, broken), pixel, batch_size=batch_size, seed=seed, rank=rank, world_size=ranks, buffer_size=8
        )
        images.set_epoch(epoch, skip)
        assert len(images) == 32 // (batch_size * ranks) * batch_size
        batches = [batch for i, batch in enumerate(DataLoader(images, batch_size, num_workers=workers)) if i >= skip]
        found.append([list(zip(b["pixel_values"].tolist(), b["random"].tolist(), strict=True)) for b in batches])
    return found


def numbers(found) -> list[int]:
    return [i for batches in found for batch in batches for i, _ in batch]


@pytest.mark.parametrize("shards", SHARDS.values(), ids=SHARDS.keys())
@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (1, 2), (2, 0), (3, 2)])
def test_every_image_of_a_stream_is_seen_once_whatever_the_shards(shards, ranks, workers):
    for epoch, batch_size in ((0, 4), (1, 5)):
        found = stream_ranks(shards, ranks, workers, batch_size, epoch)
        whole = 32 // (batch_size * ranks)
        assert [[len(batch) for batch in batches] for batches in found] == [[batch_size] * whole] * ranks
        assert len(set(numbers(found))) == len(numbers(found)) == whole * batch_size * ranks


def test_the_order_of_a_stream_depends_on_seed_and_epoch():
    first = numbers(stream_ranks(SHARDS["even"]))
    assert first == numbers(stream_ranks(SHARDS["even"]))
    others = [numbers(stream_ranks(SHARDS["even"], **kwargs)) for kwargs in ({"epoch": 1}, {"seed": 1}, {"ranks": 2})]
    assert len({tuple(order) for order in [first, sorted(first), *others]}) == 5


def test_ranks_and_workers_shuffle_independently():
    ranks = [numbers([batches]) for batches in stream_ranks([range(32)], ranks=2)]
    workers = stream_ranks([range(32)], workers=2)[0]
    for one, other in (ranks, [numbers([workers[0::2]]), numbers([workers[1::2]])]):
        assert [i - min(one) for i in one] != [i - min(other) for i in other]


def test_views_of_a_stream_are_those_of_the_indexed_images_for_any_ranks_and_workers():
    images = MapImages(table(range(32)), pixel, seed=3)
    images.set_epoch(2)
    indexed = [(i, images[i]["random"].item()) for i in range(32)]
    assert len({random for _, random in indexed}) == 32
    for shards, ranks, workers in (("even", 1, 0), ("uneven", 1, 2), ("one", 2, 2)):
        found = stream_ranks(SHARDS[shards], ranks, workers, epoch=2, seed=3)
        assert sorted(chain(*chain(*found))) == indexed


@pytest.mark.parametrize("broken", [(), (0, 6, 7, 30, 31)], ids=["whole", "broken"])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("shards", ["uneven", "one"])
def test_what_follows_a_skip_is_what_follows_without(shards, workers, broken):
    broken = dict.fromkeys(broken, b"text")
    whole = stream_ranks(SHARDS[shards], workers=workers, epoch=1, broken=broken)
    for skip in (1, 2, 5, 7, 8):
        assert stream_ranks(SHARDS[shards], workers=workers, epoch=1, skip=skip, broken=broken) == [whole[0][skip:]]


@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_images_are_not_decoded_and_the_buffer_keeps_none(workers):
    transformed = multiprocessing.Value("i", 0)

    def counting(image, generator):
        with transformed.get_lock():
            transformed.value += 1
        return pixel(image, generator)

    images = StreamedImages(stream(SHARDS["uneven"]), counting, batch_size=4, buffer_size=16)
    images.set_epoch(0, skip_batches=5)
    loader = iter(DataLoader(images, batch_size=4, num_workers=workers))
    for _ in range(5):
        next(loader)
    if not workers:  # workers run ahead
        assert transformed.value == 0
        next(loader)
        assert transformed.value == 4
    list(loader)
    assert transformed.value == 12


def test_a_skip_lasts_one_epoch_in_workers_that_are_running():
    images, fresh = (StreamedImages(stream(SHARDS["uneven"]), pixel, batch_size=4) for _ in range(2))
    loader = DataLoader(images, batch_size=4, num_workers=2, persistent_workers=True)
    images.set_epoch(0, skip_batches=3)
    assert ["random" in batch for batch in loader] == [False] * 3 + [True] * 5
    images.set_epoch(1)
    fresh.set_epoch(1)
    assert [batch["random"].tolist() for batch in loader] == read(fresh, batch_size=4, workers=2, name="random")


@pytest.mark.parametrize("workers", [0, 2])
def test_the_next_image_of_a_stream_takes_the_place_of_a_broken_one(workers):
    broken = dict.fromkeys((2, 5, 9, 10, 17, 20, 23, 30), broken_files()["truncated"])
    ends = 0  # workers whose last image is broken: their first takes its place
    for epoch in range(8):
        whole, found = (
            stream_ranks(SHARDS["uneven"], workers=workers, epoch=epoch, broken=files)[0] for files in (None, broken)
        )
        for worker in range(max(1, workers)):
            mine = slice(worker, None, max(1, workers))
            order = list(chain(*whole[mine]))
            after = [chain(order[place:], order) for place in range(len(order))]
            expected = [next(image for image in images if image[0] not in broken) for images in after]
            assert list(chain(*found[mine])) == expected
            ends += order[-1][0] in broken
    assert ends


@pytest.mark.parametrize("workers", [0, 2])
def test_the_broken_files_of_a_stream_are_named_and_counted_once(workers, tmp_path, caplog):
    source = write_parquet(
        tmp_path / "source", [range(7), range(7, ROWS)], broken=dict.fromkeys((2, 9), b"\0not an image")
    )
    rows = load_images(DataArguments(dataset_name=str(source), streaming=True)).train
    images = StreamedImages(rows, pixel, batch_size=3, buffer_size=4)
    for epoch in range(3):
        images.set_epoch(epoch)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            batches = read(images, batch_size=3, workers=workers)
        assert [len(batch) for batch in batches] == [3] * 4
        assert set(chain(*batches)) == set(range(ROWS)) - {2, 9}
        assert images.unreadable() == ["row 2", "row 9"]
        if not workers:  # the log of a worker process is not this one's
            named = [record.getMessage() for record in caplog.records if record.name == "training.data.decode"]
            expected = ["photo2.jpg", "photo9.jpg"] if epoch == 0 else []
            assert sorted(name.split(": ")[1].split()[0] for name in named) == expected


@pytest.mark.skipif(not IMAGENET, reason="MOCO_IMAGENET names no folder of parquet files")
def test_imagenet_streams_views_at_224_px():
    args = DataArguments(dataset_name=IMAGENET, streaming=True, max_train_samples=20)
    views = Views(build_policies(args.augmentation), args.image_size)
    images = StreamedImages(load_images(args).train, views, batch_size=10, buffer_size=20)
    batches = list(DataLoader(images, batch_size=10))
    assert [batch["key_pixel_values"].shape for batch in batches] == [(10, 3, 224, 224)] * 2
    assert not images.unreadable()
    assert batches[0]["pixel_values"].float().std() > 30


@pytest.mark.slow
def test_memory_stays_flat_over_a_hundred_thousand_streamed_images(tmp_path):
    images, shards = 100_000, 8
    rows = table([i % 60 for i in range(images // shards)]).cast_column("image", datasets.Image())
    for shard in range(shards):
        rows.to_parquet(tmp_path / f"train-{shard:05d}-of-{shards:05d}.parquet")
    stream = load_images(DataArguments(dataset_name=str(tmp_path), streaming=True)).train
    streamed = StreamedImages(stream, pixel, batch_size=100, buffer_size=2000)
    resident = []
    for i, _ in enumerate(DataLoader(streamed, batch_size=100)):
        if i % 100 == 99:
            resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6)
    print("resident memory after every 10,000 images, MB:", *map(round, resident))
    assert len(resident) == images // 10_000
    assert max(resident[1:]) < 1.03 * resident[0]
