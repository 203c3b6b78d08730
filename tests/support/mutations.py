"""Valid content of others, changed at random, and the one line with which it may be refused.

`MOCO_FUZZ_EXAMPLES=N` tries N random examples of each property.
"""

import copy
import io
import json
import os
import tempfile
from contextlib import redirect_stderr, suppress

import numpy as np
import yaml
from huggingface_hub.errors import StrictDataclassError
from hypothesis import HealthCheck, configuration, settings
from hypothesis import strategies as st
from PIL import Image

from training.errors import one_line_errors
from training.recipe import RECIPES

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
        ours = type(reason) is ValueError or type(reason).__module__.startswith("training.")
        assert ours, f"{reason!r} is of Python or a library"
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
RECIPE_TREES = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted(RECIPES.glob("*.yaml"))]
