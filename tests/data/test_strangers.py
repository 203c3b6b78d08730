"""Datasets that a stranger made: they take no more memory than their files, and nothing but what was named is read."""

import logging
import os
import socket
from pathlib import Path

import numpy as np
import pytest
from bombs import DATASETS, claiming, memory_for, saved, write_rows
from numbered_images import encoded, number, write_folders
from PIL import Image
from ranks import run_ranks

from training.data.decode import MAX_PIXELS, Decoder
from training.data.folders import list_files
from training.data.formats import _places_on_the_hub
from training.data.sources import DataArguments, load_images

MEGABYTES = 2**20
BOTH = [Decoder.image, Decoder.tensor]


def row(content: bytes) -> dict:
    return {"bytes": content, "path": None}


# Pixels


@pytest.mark.parametrize("decode", BOTH)
@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "BMP"])
def test_no_decoder_takes_memory_for_pixels_that_a_header_claims(decode, format):
    bomb = row(claiming(30_000, 30_000, format))
    with memory_for(100 * MEGABYTES), pytest.raises(OSError, match=r"30000 x 30000 pixels|900000000 pixels"):
        decode(Decoder(), bomb)


@pytest.mark.parametrize("decode", BOTH)
@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_the_largest_image_is_the_flags_for_both_decoders(decode, format):
    picture = row(saved(Image.effect_noise((30, 20), 90), format))
    assert decode(Decoder(max_pixels=600), picture) is not None
    with pytest.raises(OSError, match=r"30 x 20 pixels: at most 599 are read \(--max_image_pixels\)"):
        decode(Decoder(max_pixels=599), picture)


def test_an_image_above_the_limit_of_pil_is_decoded_where_the_flag_allows_it(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # brings back what it was
    picture = row(encoded(1))
    assert Decoder(max_pixels=256).image(picture).size == (16, 16)


@pytest.mark.parametrize("view_backend", ["pil", "cv2", "device"])
def test_the_flag_leaves_large_images_out_with_every_view_backend(view_backend, tmp_path, caplog):
    from training.data.pipeline import training_images
    from training.recipe import parse_pretrain

    large = saved(Image.effect_noise((100, 100), 90), "PNG")
    write_rows(tmp_path / "data", [row(encoded(0)), row(large), row(encoded(1)), row(encoded(2))])
    flags = ["--dataset_name", str(tmp_path / "data"), "--max_image_pixels", "256", "--view_backend", view_backend]
    args = parse_pretrain(["--recipe", "quickstart", "--use_cpu", "--output_dir", str(tmp_path / "run"), *flags])
    with caplog.at_level(logging.WARNING):
        images = training_images(args.data, load_images(args.data), args.training)
        images.__getitems__(range(4)) if view_backend == "device" else [images[i] for i in range(4)]
    assert images.unreadable() == ["row 1"]
    assert caplog.text.count("100 x 100 pixels") == 1


def _decode_with_little_memory(rank):
    for decode in BOTH:
        for format in ("JPEG", "PNG"):
            with memory_for(100 * MEGABYTES), pytest.raises(OSError, match="MemoryError"):
                decode(Decoder(), row(claiming(12_000, 12_000, format)))


@pytest.mark.slow
def test_an_image_that_does_not_fit_into_memory_is_an_unreadable_one():
    run_ranks(_decode_with_little_memory, (), 1)  # a process that no test has left free memory to


def test_formats_that_start_other_programs_are_not_opened(tmp_path, monkeypatch):
    canary = tmp_path / "started"
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {canary}\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for decode in BOTH:
        with pytest.raises(OSError, match="no image of a format that is read"):
            decode(Decoder(), row(saved(Image.new("RGB", (9, 9)), "EPS")))
    assert not canary.exists()


# Paths


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_the_path_of_a_row_reads_no_private_file_and_asks_no_server(streaming, tmp_path):
    (private := tmp_path / "private.png").write_bytes(encoded(5))
    with socket.create_server(("127.0.0.1", 0)) as server:
        host = "{}:{}".format(*server.getsockname())
        paths = [
            *(str(private), os.path.relpath(private), f"{tmp_path}/data/../private.png", f"file://{private}"),
            *(f"http://{host}/a.png", f"zip://a.png::http://{host}/a.zip", "hf://datasets/a/b/c.png"),
        ]
        strange = [{"bytes": None, "path": path} for path in paths]
        source = write_rows(tmp_path / "data", [row(encoded(0)), *strange, row(encoded(1))])
        splits = load_images(DataArguments(dataset_name=str(source), streaming=streaming))
        rows = [row["image"] for row in splits.train]
        assert [image["path"] for image in rows[1:-1]] == paths
        for decode in BOTH:
            for image in rows[1:-1]:
                with pytest.raises(OSError, match="has a path and no bytes"):
                    decode(splits.decoder, image)
        assert [number(splits.decoder.image(image)) for image in (rows[0], rows[-1])] == [0, 1]
        server.settimeout(0)
        with pytest.raises(BlockingIOError):
            server.accept()


def test_rows_of_a_folder_on_the_hub_are_read_from_its_repository_and_the_caches_alone(tmp_path):
    places = _places_on_the_hub({"train": ["hf://datasets/org/name@abc/train/a.png"]})
    assert places[0] == "hf://datasets/org/name@"
    for path in (
        *("hf://datasets/org/names@abc/a.png", "hf://datasets/org/name@abc/../../other/private@abc/a.png"),
        *(f"{places[-1]}../../secret.png", "/etc/hostname", "zip://a.png::https://example.com/a.zip"),
    ):
        with pytest.raises(OSError, match="has a path and no bytes"):
            Decoder(places=places).image({"bytes": None, "path": path})


def test_a_name_with_colons_is_read_from_its_folder(tmp_path):
    source = write_folders(tmp_path / "folder")
    (source / "train" / "cat" / "0.png").rename(source / "train" / "cat" / "zip::0.png")
    splits = load_images(DataArguments(dataset_name=str(source)))
    assert sorted(number(splits.decoder.image(row["image"])) for row in splits.train) == list(range(12))


@pytest.mark.parametrize("name", ["../private.png", "/etc/private.png", "train/../../private.png"])
def test_metadata_names_no_file_outside_its_folder(name, tmp_path):
    source = write_folders(tmp_path / "folder")
    (tmp_path / "private.png").write_bytes(encoded(5))
    (source / "metadata.csv").write_text(f"file_name,label\n{name},cat\n")
    with pytest.raises(ValueError, match=r"lists .*private\.png, which is no image there"):
        load_images(DataArguments(dataset_name=str(source)))


# Files without an end


def test_pipes_sockets_and_devices_are_counted_and_not_read(tmp_path, monkeypatch):
    source = write_folders(tmp_path / "folder")
    monkeypatch.chdir(source / "train" / "cat")  # the name of a socket may not be long
    os.mkfifo("pipe.png")
    os.mkfifo("pipe.parquet")
    os.symlink("/dev/zero", "zero.png")
    with socket.socket(socket.AF_UNIX) as there:
        there.bind("socket.png")
        files = {Path(file.path).name: file.size for file in list_files(source)}
        assert [files[name] for name in ("pipe.png", "pipe.parquet", "zero.png", "socket.png")] == [-2] * 4
        splits = load_images(DataArguments(dataset_name=str(source)))
    assert len(splits.train) == 12


@pytest.mark.parametrize("kind", ["pipe", "device", "hole"])
def test_an_image_that_has_become_something_without_an_end_is_an_unreadable_one(kind, tmp_path):
    source = write_folders(tmp_path / "folder")
    splits = load_images(DataArguments(dataset_name=str(source)))
    image = splits.train[0]["image"]
    os.unlink(image["path"])
    if kind == "pipe":
        os.mkfifo(image["path"])
    elif kind == "device":
        os.symlink("/dev/zero", image["path"])
    else:
        with open(image["path"], "wb") as file:
            file.write(encoded(1, "JPEG"))
            file.truncate(2**40)
    for decode in BOTH:
        with memory_for(100 * MEGABYTES), pytest.raises(OSError, match="is no file of at most"):
            decode(splits.decoder, image)


# Data files


@pytest.mark.parametrize(
    "streaming", [pytest.param(False, marks=pytest.mark.slow, id="map"), pytest.param(True, id="stream")]
)
@pytest.mark.parametrize("message", DATASETS)
def test_a_data_file_that_unpacks_to_gigabytes_is_refused(message, streaming, tmp_path):
    source = DATASETS[message](tmp_path / "data")
    with memory_for(200 * MEGABYTES), pytest.raises(ValueError, match=message) as error:
        load_images(DataArguments(dataset_name=str(source), streaming=streaming))
    assert str(error.value).isprintable()
    (file,) = source.iterdir()
    assert str(file) in str(error.value)
    for place in (tmp_path / "cache").rglob("*"):
        assert not place.is_file() or place.stat().st_size < MEGABYTES


def test_metadata_that_unpacks_to_gigabytes_is_refused(tmp_path):
    source = write_folders(tmp_path / "folder")
    bomb = DATASETS["claims 2,000,000 rows"](tmp_path / "data")
    (bomb / "train.parquet").rename(source / "metadata.parquet")
    with memory_for(100 * MEGABYTES), pytest.raises(ValueError, match="claims 2,000,000 rows"):
        load_images(DataArguments(dataset_name=str(source)))


def test_images_without_compression_of_their_own_are_read_from_a_file_with_it(tmp_path):
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[:8] = 250
    flat = [saved(Image.fromarray(np.roll(pixels, i, axis=0)), "BMP") for i in range(40)]
    source = write_rows(tmp_path / "data", [row(image) for image in flat], compression="zstd")
    assert sum(map(len, flat)) > 10 * (source / "train.parquet").stat().st_size
    assert len(load_images(DataArguments(dataset_name=str(source))).train) == 40


@pytest.mark.parametrize("value", [0, -1])
def test_a_limit_without_images_is_refused(value):
    with pytest.raises(ValueError, match=rf"max_image_pixels \({value}\) must be at least 1.*{MAX_PIXELS:,}"):
        DataArguments(max_image_pixels=value)
