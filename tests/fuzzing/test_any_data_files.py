"""Mutated parquet files and tars, and rows of any kind, are read within their size or refused in one line."""

import hashlib
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest
from bombs import compressed_member, compressed_tar, memory_for, sparse_member, write_rows
from hypothesis import example, given
from hypothesis import strategies as st
from mutations import few, mutated_bytes, refusal, texts
from numbered_images import encoded, write_tars

from training.data.folders import check_data_file
from training.data.sources import DataArguments, load_images


def content(make, name: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return (make(Path(folder) / "data") / name).read_bytes()


GOOD = [{"bytes": encoded(i), "path": f"{i}.png"} for i in range(4)]
PARQUET = content(lambda folder: write_rows(folder, GOOD), "train.parquet")
TAR = content(write_tars, "train-0.tar")
PACKED_TARS = [content(make, "train.tar") for make in (compressed_tar, compressed_member, sparse_member)]
files = st.tuples(st.just("a.parquet"), mutated_bytes([PARQUET])) | st.tuples(
    st.just("a.tar"), mutated_bytes([TAR, *PACKED_TARS])
)
images = st.none() | st.fixed_dictionaries(
    {
        "bytes": st.none() | st.sampled_from([encoded(0), encoded(1), b""]) | st.binary(max_size=8),
        "path": st.none()
        | texts.filter(str.isascii)
        | st.sampled_from(["/etc/hostname", "http://127.0.0.1:9/a", "a::b"]),
    }
)


@given(file=files)
@example(file=("a.tar", b""))
@example(file=("a.parquet", b""))
@example(file=("a.tar", TAR[:700]))
@example(file=("a.parquet", PARQUET[:-9] + b"\xff\xff\xff\x7f" + b"PAR1"))
def test_a_data_file_is_looked_at_or_refused(place, file):
    name, data = file
    with place() as folder:
        (folder / name).write_bytes(data)
        with memory_for(200 * 2**20):
            refusal(lambda: check_data_file(folder / name, hashlib.sha256()), folder / name)


@pytest.mark.filterwarnings("ignore")  # PIL warns of what it passes over
@few
@given(rows=st.lists(images, min_size=1, max_size=6), streaming=st.booleans())
@example(rows=[{"bytes": None, "path": None}], streaming=True)
@example(rows=[{"bytes": encoded(0), "path": "\x1b[2J"}, None], streaming=False)
def test_rows_are_read_from_their_bytes_or_refused(place, rows, streaming):
    with place() as folder:
        source = write_rows(folder / "data", rows)
        splits = []
        data = DataArguments(dataset_name=str(source), streaming=streaming)
        if refusal(lambda: splits.append(load_images(data)), as_printed=True) is None:
            for row in splits[0].train:
                with suppress(OSError):
                    splits[0].decoder.image(row["image"])
                    assert row["image"]["bytes"] is not None
