"""What others made is read, or refused in one line that names it: mutated images, folders, recipes, runs and checkpoints.

Every property starts from something valid and changes it. `MOCO_FUZZ_EXAMPLES=N` tries N random examples of each.
"""

import copy
import io
import json
import os
import shutil
import tempfile
from contextlib import contextmanager, redirect_stderr, suppress
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
import yaml
from huggingface_hub.errors import StrictDataclassError
from hypothesis import HealthCheck, configuration, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_models import moco_config

from modeling_moco import MoCoModel
from modeling_moco.modeling_moco import build_encoder
from training.convert.files import read
from training.data.decode import decode_image, decode_tensor, is_an_image
from training.data.folders import arrange, divide_data_files, list_files
from training.data.sources import DataArguments, load_images
from training.engine.checkpoints import BatchLayout, check_layout, find_defect, newest_complete, write_manifest
from training.engine.results import read_results
from training.engine.run_folder import (
    DATASET,
    MANIFEST,
    METRICS,
    RESULTS,
    SAVED_RECIPE,
    SPLIT,
    check_same_data,
    check_same_run,
    ended,
    read_metrics,
    recorded_content,
)
from training.errors import one_line_errors
from training.evaluation.finetune import read_split
from training.recipe import RECIPES, load_recipe, parse_pretrain

LONG = int(os.environ.get("MOCO_FUZZ_EXAMPLES", "0"))  # examples of every property; 0 for the suite's few
configuration.set_hypothesis_home_dir(tempfile.gettempdir() + "/hypothesis")  # and not the checkout
settings.register_profile(
    "suite",
    max_examples=LONG or 30,
    derandomize=not LONG,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
settings.load_profile("suite")
few = settings(max_examples=LONG or 10)  # of what takes a tenth of a second


def refusal(call, *named, as_printed: bool = False) -> str | None:
    """The one line with which a call refuses what it reads, which has these words; None where it reads it.

    Args:
        as_printed: look at what a command prints, where values and names of files are somebody's own.
    """
    try:
        call()
    except (ValueError, StrictDataclassError) as error:
        reason = error.__cause__ if isinstance(error, StrictDataclassError) else error
        assert type(reason) is ValueError, f"{reason!r} is of Python or a library"
        line = str(reason)
        if as_printed:
            with redirect_stderr(io.StringIO()) as printed, suppress(SystemExit), one_line_errors():
                raise
            line = printed.getvalue().removesuffix("\n")
        assert line.isprintable(), line
        assert len(line) < 2000, line[:3000]
        for word in named:
            assert str(word) in line, line
        return line
    return None


@pytest.fixture
def place(tmp_path):
    """A function that gives a fresh empty folder."""

    @contextmanager
    def fresh():
        folder = tmp_path / "place"
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder)

    return fresh


# Mutations

positions = st.integers(0, 64) | st.integers(0, 1 << 20)  # of a byte, modulo the length: heads of files say the most
chunks = st.binary(min_size=1, max_size=8) | st.sampled_from(
    [
        b"\0" * 8,
        b"\xff" * 4,
        b"\x7f\xff\xff\xff",
        b"\0\0\0\x01",
        b"\x01\0\0\0",
        b"\xff\xd9",
        b"\n",
        "é".encode(),
        b"\x1b[2J",
    ]
)
edits = st.lists(
    st.tuples(st.sampled_from(["write", "insert", "delete", "cut", "repeat"]), positions, chunks), max_size=6
)


def edited(data: bytes, edits) -> bytes:
    for kind, position, chunk in edits:
        at = position % (len(data) + 1)
        if kind == "write":
            data = data[:at] + chunk + data[at + len(chunk) :]
        elif kind == "insert":
            data = data[:at] + chunk + data[at:]
        elif kind == "delete":
            data = data[:at] + data[at + len(chunk) :]
        elif kind == "repeat":
            data = data[:at] + data[max(0, at - 16 * len(chunk)) :]
        else:
            data = data[:at]
    return data


def mutated_bytes(seeds):
    return st.builds(edited, st.sampled_from(seeds), edits)


texts = st.text(max_size=12) | st.sampled_from(
    ["", "\n", "\x1b[2J", "été", "猫", "\ud800", "a/../b", "\0", "x" * 300, "1e-4"]
)
numbers = (
    st.integers(-3, 3)
    | st.floats()
    | st.sampled_from([2**31, 2**63, -(2**63), 2**64, 10**400, -(10**19), 0.5, True, float("nan"), float("inf")])
)
anything = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)


def replaced(tree, steps, kind, key, value):
    """A copy of a tree of dictionaries and lists with one node changed: `steps` choose the way to it."""
    tree = copy.deepcopy(tree)
    parent, at, node = None, None, tree
    for step in steps:
        if not isinstance(node, dict | list) or not node:
            break
        parent, at = node, list(node)[step % len(node)] if isinstance(node, dict) else step % len(node)
        node = node[at]
    if parent is None:
        return value
    if kind == "delete":
        del parent[at]
    elif kind == "add" and isinstance(parent, dict):
        parent[key] = value
    elif kind == "text":
        parent[at] = str(node)
    elif kind == "wrap":
        parent[at] = [node]
    else:
        parent[at] = value
    return tree


def mutated_tree(seeds, values=anything):
    changes = st.tuples(
        st.lists(st.integers(0, 40), min_size=1, max_size=4),
        st.sampled_from(["replace", "replace", "delete", "add", "text", "wrap"]),
        texts,
        values,
    )

    def change(tree, changes):
        for steps, kind, key, value in changes:
            tree = replaced(tree, steps, kind, key, value)
        return tree

    return st.builds(change, st.sampled_from(seeds), st.lists(changes, min_size=1, max_size=3))


DEEP = b"[" * 100_000
OF_JSON = [
    b"",
    b"\xef\xbb\xbf{}",
    b"\xff\xfe{\0}\0",
    b"null",
    b"{}",
    b"[]",
    DEEP,
    b'{"a":' * 50_000,
    b"9" * 5000,
    b"NaN",
]
OF_YAML = [
    *(
        b"",
        b"null",
        b"- 1",
        b"[" * 20_000,
        b"a: &a [*a]",
        b"a: &a {b: *a}",
        b"a: 2001-99-99",
        b"? [1]\n: 2",
        b"!!int ''",
    ),
    *(b"!!bool x", b"!!timestamp x", b"a: !!binary \xc3", b"!!python/name:os.system", b"%YAML 9"),
    *(
        b"--- a\n--- b",
        b"a: b: c",
        b"\t",
        b"a: =",
        b"a: 0x",
        b"1:60",
        b"<<: 1",
        b"{a: 1}",
        b"\x85\xff",
        b"data:\n  ? {}\n",
    ),
    b"a: &a [1,1,1,1,1,1,1,1,1]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]\n"
    b"data: {dataset_name: [*c,*c,*c,*c,*c,*c,*c,*c,*c]}",
]


def mutated_json(tree):
    def dumped(tree) -> bytes:
        return json.dumps(tree).encode()

    return mutated_tree([tree]).map(dumped) | mutated_bytes([dumped(tree)]) | st.sampled_from(OF_JSON)


def yaml_bytes(tree) -> bytes:
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True).encode(errors="surrogatepass")


def mutated_yaml(trees):
    return mutated_tree(trees).map(yaml_bytes) | mutated_bytes(list(map(yaml_bytes, trees))) | st.sampled_from(OF_YAML)


# Images


def pictures() -> list[bytes]:
    """A small picture in every format and kind of pixel."""
    noise = np.random.default_rng(0).integers(0, 256, (12, 18, 3), dtype=np.uint8)
    image, exif = Image.fromarray(noise), Image.Exif()
    exif[0x0112] = 6
    deep = Image.fromarray((noise[..., 0].astype(np.uint16) << 8) + 7)
    kinds = [
        *((image, "JPEG", {"exif": exif}), (image, "JPEG", {"progressive": True}), (image.convert("L"), "JPEG", {})),
        *(
            (image.convert("CMYK"), "JPEG", {}),
            (image, "JPEG", {"xmp": b'<x tiff:Orientation="6"/>'}),
            (image, "MPO", {}),
        ),
        *((image, "PNG", {"exif": exif}), (image.convert("P"), "PNG", {"transparency": 3}), (deep, "PNG", {})),
        *((image.convert("LA"), "PNG", {}), (image.convert("1"), "PNG", {}), (image, "GIF", {}), (image, "BMP", {})),
        *(
            (image, "GIF", {"save_all": True, "append_images": [image]}),
            (image.convert("P"), "BMP", {}),
            (image, "PPM", {}),
        ),
        *((deep, "PPM", {}), (image, "WEBP", {"exif": exif}), (image.convert("RGBA"), "WEBP", {"lossless": True})),
        *(
            (image, "TIFF", {}),
            (deep, "TIFF", {}),
            (image, "TIFF", {"compression": "tiff_lzw"}),
            (image, "JPEG2000", {}),
        ),
        *(
            (image, "TIFF", {"compression": "jpeg"}),
            (image.convert("CMYK"), "TIFF", {}),
            (image.convert("F"), "TIFF", {}),
        ),
        *((image, "TGA", {"compression": "tga_rle"}), (image.convert("P"), "TGA", {})),
        *(
            (image.convert("1"), "TIFF", {"compression": "group4"}),
            (image, "TIFF", {"compression": "tiff_adobe_deflate"}),
        ),
    ]
    files = []
    for picture, format, options in kinds:
        file = io.BytesIO()
        picture.save(file, format, **options)
        files.append(file.getvalue())
    return files


def avif() -> bytes:
    """An AVIF picture; of a Pillow without it (before 11.3) another one."""
    file = io.BytesIO()
    with suppress(KeyError):
        Image.new("RGB", (9, 7), "teal").save(file, "AVIF")
    return file.getvalue() or pictures()[0]


AVIF = avif()
PICTURES = [*pictures(), AVIF]


@pytest.mark.filterwarnings("ignore")  # PIL and torchvision warn of what they pass over
@settings(max_examples=LONG or 300)
@given(mutated_bytes(PICTURES) | st.binary(max_size=64))
@example(PICTURES[0].replace(b"\x01\x12\0\x03", b"\x01\x12\0\xe2"))  # an orientation of unknown type
def test_an_image_is_decoded_by_both_decoders_or_by_none(data):
    found = []
    for decode in (decode_image, decode_tensor):
        try:
            pixels = decode({"bytes": data, "path": None})
        except OSError as error:
            found.append(f"{type(error).__name__}: {error}")
        else:
            found.append(torch.from_numpy(np.array(pixels)).permute(2, 0, 1) if decode is decode_image else pixels)
    unreadable = [isinstance(pixels, str) for pixels in found]
    assert unreadable[0] == unreadable[1], found
    if not unreadable[0]:
        assert found[0].shape == found[1].shape
        if data.startswith(b"\xff\xd8"):  # of damaged fax files libtiff leaves pixels as the memory was
            assert torch.equal(*found)


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=LONG or 200)
@given(data=mutated_bytes(PICTURES))
@example(data=AVIF.replace(b"av1C\x81", b"av1C\0"))
@example(data=AVIF.replace(b"pitm", b"\0itm"))
def test_any_file_is_an_image_or_is_not(place, data):
    with place() as folder:
        (folder / "file").write_bytes(data)
        is_an_image(folder / "file")


# Folders

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
                    decode_image(row["image"])


@few
@given(
    data=st.tuples(
        st.sampled_from(["metadata.csv", "metadata.jsonl", "metadata.parquet"]), mutated_bytes(METADATA_FILES)
    )
)
@example(data=("metadata.csv", b"file\x7f\xff\xff\xff,label\n"))
def test_metadata_is_read_or_refused(place, data):
    name, content = data
    with place() as root:
        grow(root, [("a.png", "picture"), ("b.png", "picture"), (name, content)])
        refusal(lambda: load_images(DataArguments(dataset_name=str(root))), root, as_printed=True)


# Recipes

RECIPE_TREES = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted(RECIPES.glob("*.yaml"))]


@settings(max_examples=LONG or 100)
@example(data=b"\0")
@example(data=b"[" * 20_000)
@example(data=b"data: {image_size: !!int ''}")
@example(data=b"1: {}")
@example(data=b'data: {"\\e[2J": 1}')
@example(data=b"training: {learning_rate: .nan}")
@example(data=b"training: {learning_rate: 1" + b"0" * 400 + b"}")
@given(data=mutated_yaml(RECIPE_TREES))
def test_a_recipe_is_loaded_or_refused(place, data):
    with place() as folder:
        path = folder / "mine.yaml"
        path.write_bytes(data)
        refusal(lambda: load_recipe(str(path)), path)


@pytest.fixture
def _own_world():
    """Settings of transformers change the environment and the level of its log."""
    level = transformers.logging.get_verbosity()
    with patch.dict(os.environ):  # replaces nothing: it brings the environment back
        yield
    transformers.logging.set_verbosity(level)


KEYS = {
    "data": [
        "dataset_name",
        "image_size",
        "eval_resize",
        "crop_min_scale",
        "shuffle_buffer",
        "streaming",
        "view_backend",
    ],
    "model": [
        "architecture",
        "model_args",
        "queue_size",
        "temperature",
        "image_mean",
        "image_std",
        "batch_norm_splits",
    ],
    "training": [
        "learning_rate",
        "num_train_epochs",
        "lr_milestones",
        "knn_k",
        "report_to",
        "optim",
        "optim_args",
        "seed",
    ],
    "probe": ["learning_rates", "mode", "lr_milestones", "num_train_epochs"],
}


@pytest.mark.filterwarnings("ignore")  # transformers warns of settings that it will drop
@pytest.mark.usefixtures("_own_world")
@settings(max_examples=LONG or 60)
@given(
    data=mutated_yaml(RECIPE_TREES),
    changes=st.lists(
        st.sampled_from([(section, key) for section, keys in KEYS.items() for key in keys]).flatmap(
            lambda place: st.tuples(st.just(place), anything)
        ),
        max_size=2,
    ),
)
@example(data=b"", changes=[(("data", "dataset_name"), None)])
@example(data=b"", changes=[(("model", "image_mean"), [0, 1, 0])])
@example(data=b"", changes=[(("training", "knn_k"), "200")])
def test_a_run_is_parsed_from_a_recipe_or_refused(place, data, changes):
    with place() as folder:
        path = folder / "mine.yaml"
        if changes:
            tree = copy.deepcopy(RECIPE_TREES[-1])
            for (section, key), value in changes:
                tree[section][key] = value
            data = yaml_bytes(tree)
        path.write_bytes(data)
        refusal(lambda: parse_pretrain(["--recipe", str(path), "--use_cpu", "--report_to", "none"]), as_printed=True)


# Runs

RESULT = {
    **{"protocol": "weighted kNN", "metric": "top1", "value": 93.5, "n": 360, "feature": "backbone", "seed": None},
    **{"settings": {"k": 200, "T": 0.07}, "interval": [90.4, 95.6], "model": "0123456789abcdef"},
    **{"data": {"dataset": "digits", "split": "test"}, "versions": {"torch": "2"}, "date": "2026-01-01T00:00:00+00:00"},
    **{"command": "knn.py x", "hardware": "2 CPU cores", "processes": 1, "commit": None},
}


@pytest.mark.filterwarnings("ignore:Generating overly large repr")
@given(data=mutated_json([RESULT, RESULT]))
@example(data=b"{")
@example(data=b"null")
@example(data=b'["protocol"]')
@example(data=b'[{"protocol": 1}]')
@example(data=json.dumps([RESULT | {"interval": [None]}]).encode())
@example(data=json.dumps([RESULT, {key: value for key, value in RESULT.items() if key != "interval"}]).encode())
@example(data=DEEP)
def test_results_are_read_or_refused(place, data):
    with place() as folder:
        (folder / RESULTS).write_bytes(data)
        entries = []
        if refusal(lambda: entries.extend(read_results(folder)), folder / RESULTS, "move it away") is None:
            for entry in entries:
                low, high = entry["interval"]
                f"{entry['value']:.2f} {low:.2f} {high:.2f} {entry['n']:,} {entry['date'][:10]} {entry['data'].get('split')}"


METRICS_TREE = {
    "ended": "2026-01-01T00:00:00+00:00",
    "knn_top1_before": None,
    "knn_top1_after": 93.5,
    "loss": 2,
    "data": {"dataset": "digits", "local": False},
    "probes": [{"name": "official", "protocol": "linear probe", "top1": 90.5, "n": 360}],
}


@pytest.mark.filterwarnings("ignore:Generating overly large repr")
@given(data=mutated_json(METRICS_TREE))
@example(data=b"")
@example(data=json.dumps(METRICS_TREE).encode()[:40])
@example(data=b"[]")
@example(data=b'{"probes": [1]}')
@example(data=b'{"probes": [{"name": "official"}]}')
@example(data=b'{"ended": 1}')
@example(data=DEEP)
def test_metrics_are_read_or_refused(place, data):
    with place() as folder:
        path, metrics = folder / METRICS, {}
        path.write_bytes(data)
        if refusal(lambda: metrics.update(read_metrics(path, "move it away")), path, "move it away") is None:
            assert isinstance(ended(folder), str | None)
            for name in ("knn_top1_before", "knn_top1_after", "loss"):
                assert metrics.get(name) is None or f"{metrics[name]:.2f}"
            assert all(
                isinstance(probe[name], str) for probe in metrics.get("probes", []) for name in ("name", "protocol")
            )


@given(data=mutated_json({"dataset": "digits", "seed": 0, "indices": {"0": [3, 5], "1": [2]}}))
@example(data=b"")
@example(data=b'{"indices": {"0": [3, 5]')
@example(data=b'{"indices": {"0": "35"}}')
@example(data=b'{"indices": {"0": [-1]}}')
@example(data=b'{"indices": {}}')
@example(data=b"[]")
@example(data=DEEP)
def test_a_split_is_read_or_refused(place, data):
    with place() as folder:
        path, split = folder / SPLIT, {}
        path.write_bytes(data)
        if refusal(lambda: split.update(read_split(path)), path, "bring it back") is None:
            assert min(i for images in split.values() for i in images) >= 0


LAYOUT = BatchLayout(processes=2, per_device_batch_size=8, accumulation=1, images=100, workers=2, epoch=0.5)
MANIFEST_TREE = {
    "files": {"model.safetensors": 4, "below/rng_state.pth": 2},
    "batch_layout": {
        "processes": 2,
        "per_device_batch_size": 8,
        "accumulation": 1,
        "images": 100,
        "workers": 2,
        "epoch": 0.5,
    },
}


@given(data=mutated_json(MANIFEST_TREE))
@example(data=b'{"files": null}')
@example(data=b"[]")
@example(data=b'{"files": {}, "batch_layout": {}}')
@example(data=json.dumps(MANIFEST_TREE | {"files": {"x" * 300: 1}}).encode())
@example(data=json.dumps(MANIFEST_TREE).replace("0.5", "NaN").encode())
@example(data=json.dumps(MANIFEST_TREE).replace('"accumulation": 1', '"accumulation": 0').encode())
@example(data=DEEP)
def test_a_checkpoint_is_complete_or_passed_over(place, data):
    with place() as folder:
        older, newer = folder / "checkpoint-9", folder / "checkpoint-10"
        for checkpoint in (older, newer):
            (checkpoint / "below").mkdir(parents=True)
            (checkpoint / "model.safetensors").write_bytes(b"1234")
            (checkpoint / "below" / "rng_state.pth").write_bytes(b"12")
        write_manifest(older, LAYOUT)
        (newer / MANIFEST).write_bytes(data)
        defect = find_defect(newer)
        found, damaged = newest_complete(folder)
        assert found == (older if defect else newer)
        assert len(damaged) == (defect is not None)
        assert all(line.isprintable() and str(newer) in line for line in damaged)
        refusal(lambda: check_layout(found, LAYOUT), found)


@given(data=mutated_yaml(RECIPE_TREES))
@example(data=b"")
@example(data=b"data: 1")
@example(data=b"data: {1: 2}")
@example(data=b'data: {"\\e[2J": 1}')
@example(data=b"\xff")
def test_a_folder_holds_the_same_run_or_is_refused(place, data):
    with place() as folder:
        (folder / SAVED_RECIPE).write_bytes(data)
        now = {section: RECIPE_TREES[-1][section] for section in ("data", "model", "training")}
        refusal(lambda: check_same_run(folder, now, {}), folder)


@given(data=mutated_json({"dataset": "digits", "content": {"train": "1,437 images 0123", "test": "360 images 4567"}}))
@example(data=b"{")
@example(data=b"{}")
@example(data=b'{"dataset": "digits", "content": [1]}')
def test_a_run_has_the_same_data_or_is_refused(place, data):
    with place() as folder:
        (folder / DATASET).write_bytes(data)
        content = []
        if refusal(lambda: content.append(recorded_content(folder, "digits")), folder / DATASET) is None:
            assert all(isinstance(text, str) for text in content[0].values())
        now = {"dataset": "digits", "content": {"train": "1,437 images 0123"}}
        refusal(lambda: check_same_data(folder, now), folder)


# Checkpoints of other code


def official_state() -> dict[str, torch.Tensor]:
    """The tensors of main_moco.py for a ResNet-18, which share one memory, so that the file is small."""
    with torch.device("meta"):
        encoder = build_encoder(moco_config("resnet18")).state_dict()
    shapes = {name: tensor.shape for name, tensor in encoder.items()} | {"fc.weight": (16, 512), "fc.bias": (16,)}
    memory, steps = torch.zeros(512 * 512 * 9, dtype=torch.float16), torch.zeros((), dtype=torch.int64)
    state = {"queue": memory[: 16 * 32].view(16, 32), "queue_ptr": torch.zeros(1, dtype=torch.int64)}
    for name, shape in shapes.items():
        tensor = steps if name.endswith("tracked") else memory[: int(np.prod(shape))].view(shape)
        state[f"encoder_q.{name}"] = tensor
    return {f"module.{name}": tensor for name, tensor in state.items()}


STATE = official_state()
HEADS = ["module.encoder_q.fc.weight", "module.encoder_q.fc.bias", "module.queue", "module.queue_ptr"]
sizes = st.sampled_from([0, 1, 2, 3, 16, 32, 10**4, 10**11, 2**40])
tensors = st.builds(
    lambda shape, kind: torch.zeros((), dtype=kind).expand(shape),
    st.lists(sizes, max_size=3).filter(lambda shape: np.prod([float(n) for n in shape]) < 2**60),
    st.sampled_from([torch.float32, torch.float16, torch.int64, torch.bool, torch.complex64, torch.uint8]),
)
values = (
    tensors
    | anything
    | st.sampled_from(
        [torch.zeros(2, device="meta"), torch.eye(2).to_sparse(), torch.tensor(float("nan")), torch.tensor(1.5)]
    )
)
of_file = st.dictionaries(
    st.sampled_from(["epoch", "arch", "best_acc1", "optimizer", "state_dict", "student", 7, ("a",), "x\ny"]),
    values,
    max_size=3,
)
of_state = st.dictionaries(
    st.sampled_from(
        [*HEADS, "module.encoder_q.conv1.weight", "module.x\n", "conv1.weight", "module.fc.weight", 3, "module."]
    )
    | texts,
    values | st.just("left out"),
    max_size=3,
)


@few
@example(around={}, changes={}, edits=[])
@example(around={"epoch": 10**400}, changes={}, edits=[])
@example(around={}, changes={"module.queue": torch.zeros(()).expand(16, 10**11)}, edits=[])
@given(around=of_file, changes=of_state, edits=st.just([]) | edits)
def test_a_checkpoint_of_other_code_is_read_or_refused(place, around, changes, edits):
    state = {name: tensor for name, tensor in (STATE | changes).items() if not isinstance(tensor, str)}
    with place() as folder:
        path = folder / "checkpoint.pth.tar"
        with suppress(UnicodeEncodeError):  # torch cannot save some names
            torch.save({"epoch": 3, "arch": "resnet18", "state_dict": state} | around, path)
            path.write_bytes(edited(path.read_bytes(), edits))
            checkpoint = []
            if refusal(lambda: checkpoint.append(read(str(path))), path) is None:
                assert str(checkpoint[0]).isprintable()
                assert all(note.isprintable() for note in checkpoint[0].notes)


@pytest.fixture(scope="module")
def model_files(tmp_path_factory):
    """The files of a saved model of this project, by name."""
    folder = tmp_path_factory.mktemp("model")
    MoCoModel(moco_config()).save_pretrained(folder)
    (folder / "conversion.json").write_text(json.dumps({"format": "official MoCo", "epoch": 3, "prefix": ""}))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.filterwarnings("ignore")
@few
@given(data=st.data(), name=st.sampled_from(["config.json", "conversion.json", "model.safetensors"]))
def test_a_model_directory_is_read_or_refused(place, model_files, data, name):
    whole = model_files[name]
    mutated = mutated_bytes([whole]) if name.endswith("safetensors") else mutated_json(json.loads(whole))
    files = model_files | {name: data.draw(mutated)}
    with place() as folder:
        for file, content in files.items():
            (folder / file).write_bytes(content)
        refusal(lambda: read(str(folder)), folder)
