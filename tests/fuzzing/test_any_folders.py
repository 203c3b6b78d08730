"""Folders and metadata of any kind are walked to the last file, or refused in one line."""

import io
import os
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import example, given
from hypothesis import strategies as st
from mutations import PICTURES, few, mutated_bytes, refusal
from PIL import Image

from training.data.folders import arrange, divide_data_files, list_files
from training.data.sources import DataArguments, load_images

PICTURE = PICTURES[6]
METADATA_FILES = [
    *(
        b"file_name,label\nb.png,cat\n",
        b"file_name,label\nb.png,1\n",
        b"file_name\nb.png\n",
        b"label,file_name\n,b.png\n",
    ),
    *(
        b"label\ncat\n",
        b"file_name,label\nb.png,2.5\n",
        b"file_name,label,label\nb.png,1,2\n",
        b"file_name,file_name,label\n",
    ),
    *(
        b'{"file_name": "b.png", "label": "cat"}\n',
        b'{"file_name": "b.png", "label": [1]}\n',
        b'{"file_name": 1, "label": 1}',
    ),
    *(
        b'{"file_name": null, "label": {"a": null}}',
        b'{"file_name": "b.png", "label": "2001-01-01"}',
        b"",
        b"{",
        b"\xff\xfe",
    ),
]


def parquet(**columns) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file)
    return file.getvalue()


METADATA_FILES += [
    *(parquet(file_name=["b.png"], label=["cat"]), parquet(file_name=["b.png"], label=[b"cat"])),
    *(
        parquet(file_name=[b"b.png"], label=[1]),
        parquet(file_name=[["b.png"]], label=[1]),
        parquet(file_name=[1], label=[1]),
    ),
]
names = st.sampled_from(
    [
        *(
            "train",
            "test",
            "Train",
            "val",
            "validation",
            "unlabeled",
            "cat",
            "été",
            "a b",
            "c[1]",
            "images",
            "masks",
            ".git",
        ),
        *("a.png", "b.png", "c.JPG", "d", "e.txt", "f.zip", "g.parquet", "train.tar", "metadata.csv", "metadata.jsonl"),
        *(
            "metadata.parquet",
            "new\nline",
            "\x1b[2J.png",
            "\udcff.png",
            "\udce9t\udce9",
            "x" * 250,
            "\\",
            "*",
            "~",
            "__MACOSX",
        ),
        *("dataset_dict.json", "state.json", "test-tube", "train2017", "{}", "%s", "\u202e.png", "a:b", "'", '"'),
    ]
) | st.text(min_size=1, max_size=5).filter(lambda name: "/" not in name and "\0" not in name)
paths = st.lists(names, min_size=1, max_size=4).map("/".join)
contents = (
    st.sampled_from(["picture"] * 4 + ["empty", "folder", "fifo"])
    | st.sampled_from(METADATA_FILES)
    | st.tuples(st.just("link"), paths | st.sampled_from([".", "..", "nowhere", "/dev/zero", "/dev/null", "a.png"]))
    | mutated_bytes([PICTURE, *METADATA_FILES])
)
trees = st.lists(st.tuples(paths, contents), min_size=1, max_size=8)


def grow(root: Path, tree) -> None:
    """Make what the file system allows of a tree; every picture is another one."""
    for number, (path, content) in enumerate(tree):
        place = root / path
        with suppress(OSError, UnicodeEncodeError):
            place.parent.mkdir(parents=True, exist_ok=True)
            if content == "folder":
                place.mkdir()
            elif content == "fifo":
                os.mkfifo(place)
            elif isinstance(content, tuple):
                place.symlink_to(content[1])
            elif not os.path.lexists(place):
                colours = np.full((4, 4, 3), number, np.uint8)
                colours[0] = 255
                Image.fromarray(colours).save(picture := io.BytesIO(), "PNG")
                place.write_bytes({"picture": picture.getvalue(), "empty": b""}.get(content, content))


@example(tree=[("train/\udce9t\udce9/a.png", "picture")], asked=set())
@example(tree=[("train/new\nline/a.png", "picture"), ("Train/cat/b.png", "picture")], asked=set())
@given(tree=trees, asked=st.sets(names, max_size=1))
def test_a_folder_is_walked_to_the_last_file_or_refused(place, tree, asked):
    with place() as root:
        grow(root, tree)
        files = []
        if refusal(lambda: files.extend(list_files(root)), root, as_printed=True) is None:
            folder = []
            if refusal(lambda: folder.append(arrange(root, files, asked)), root, as_printed=True) is None:
                assert sum(map(len, folder[0].splits.values())) + folder[0].left_out.total() == len(files)
                folder[0].account()
            refusal(lambda: divide_data_files(root, files), root, as_printed=True)


@few
@example(tree=[("train/\udce9t\udce9/a.png", "picture")], streaming=False, labelled=False)
@example(tree=[("state.json", "picture")], streaming=False, labelled=False)
@given(tree=trees, streaming=st.booleans(), labelled=st.booleans())
def test_a_folder_is_opened_or_refused(place, tree, streaming, labelled):
    with place() as root:
        grow(root, tree)
        splits = []
        data = DataArguments(dataset_name=str(root), streaming=streaming)
        if refusal(lambda: splits.append(load_images(data, labelled)), as_printed=True) is None:
            for row in splits[0].train:
                with suppress(OSError):
                    splits[0].decoder.image(row["image"])


@few
@given(
    data=st.tuples(
        st.sampled_from(["metadata.csv", "metadata.jsonl", "metadata.parquet"]), mutated_bytes(METADATA_FILES)
    )
)
@example(data=("metadata.csv", b"file_name,label\n"))
@example(data=("metadata.csv", b"file\x7f\xff\xff\xff,label\n"))
def test_metadata_is_read_or_refused(place, data):
    name, content = data
    with place() as root:
        grow(root, [("a.png", "picture"), ("b.png", "picture"), (name, content)])
        refusal(lambda: load_images(DataArguments(dataset_name=str(root))), root, as_printed=True)
