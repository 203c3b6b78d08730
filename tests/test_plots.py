"""Figures show what they are given: read back from the SVG, whose lines, frames and words can be counted."""

import base64
import io
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from training.evaluation.scores import score
from training.plots import (
    BLUE,
    COLOURS,
    DPI,
    VERMILION,
    DrawnImage,
    Tile,
    confusion,
    describe_view,
    embedding,
    image_rows,
    neighbour_grid,
    short_names,
    training_curves,
    view_pairs,
)
from training.transfer.figures import draw_bars
from training.views.policy import ViewParams

NS = {"svg": "http://www.w3.org/2000/svg"}
HISTORY = [
    {"epoch": 0.0, "eval_knn_top1": 20.0},
    {"epoch": 0.5, "loss": 4.1, "contrast_top1": 3.0, "contrast_top5": 9.0, "learning_rate": 0.03},
    {"epoch": 1.0, "loss": 3.2, "contrast_top1": 30.0, "contrast_top5": 50.0, "learning_rate": 0.01},
    {"epoch": 1.0, "eval_knn_top1": 60.0},
    {"epoch": 1.0, "train_runtime": 3.0},
]


def png(path: Path) -> Image.Image:
    with Image.open(path.with_suffix(".png")) as image:
        image.load()
        assert image.format == "PNG"
        assert image.width == 1600  # twice the width of a README
        return image.convert("RGB")


def svg(path: Path) -> ElementTree.Element:
    root = ElementTree.parse(path.with_suffix(".svg")).getroot()
    assert root.tag == f"{{{NS['svg']}}}svg"
    return root


def words(path: Path) -> list[str]:
    """All texts of a figure: matplotlib leaves them as comments beside their outlines."""
    return re.findall(r"<!-- (.*?) -->", path.with_suffix(".svg").read_text())


def frames(path: Path, colour: str) -> int:
    return len(re.findall(rf'<path d="[^"]*z\s*"[^>]*stroke: {colour}', path.with_suffix(".svg").read_text()))


def points(root: ElementTree.Element, series: str) -> np.ndarray:
    """Corners of a line, in points of the page."""
    line = root.find(f".//svg:g[@id='{series}']/svg:path", NS)
    assert line is not None, series
    return np.array(re.findall(r"[ML] (\S+) (\S+)", line.get("d")), dtype=float)


def test_the_dashed_line_lies_at_the_chance_loss(tmp_path):
    path = tmp_path / "curves"
    training_curves(HISTORY, chance=4.7, path=path)
    root = svg(path)
    (_, high), (_, low) = points(root, "loss")
    expected = low + (4.7 - 3.2) / (4.1 - 3.2) * (high - low)
    assert points(root, "chance")[:, 1] == pytest.approx([expected] * 2, abs=1e-3)
    assert "all keys alike 4.70" in words(path)
    assert png(path).height < 1200


HEALTH = {
    **{"positive_similarity": 0.9, "hardest_negative_similarity": 0.6, "alignment": 0.2, "uniformity": -3.0},
    **{
        "queue_age": 16.0,
        "key_drift": 0.7,
        "eval_rankme": 12.0,
        "eval_contrast_top1_shuffled": 20.0,
        "eval_knn_top1_k20": 61.0,
    },
}


def test_what_was_logged_is_drawn_and_nothing_else(tmp_path):
    training_curves(HISTORY[1:3], chance=4.17, path=tmp_path / "short")
    training_curves([*HISTORY, {"epoch": 1.0} | HEALTH], chance=4.17, path=tmp_path / "long", knn_k=200)
    short, long = svg(tmp_path / "short"), svg(tmp_path / "long")
    for series in ("loss", "contrast_top1", "contrast_top5", "learning_rate"):
        assert len(points(short, series)) == len(points(long, series)) == 2
    for series in HEALTH:
        assert short.find(f".//*[@id='{series}']") is None
        assert len(points(long, series)) == 1
    assert short.find(".//*[@id='eval_knn_top1']") is None
    assert {"k 200: 60", "k 20: 61", "its key: 0.9", "hardest negative: 0.6"} <= set(words(tmp_path / "long"))
    up = points(long, "eval_knn_top1")
    assert up[0, 0] < up[1, 0]  # later to the right
    assert up[0, 1] > up[1, 1]  # better above


def test_the_same_data_give_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        training_curves(HISTORY, chance=4.17, path=tmp_path / name)
    for suffix in (".png", ".svg"):
        assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


RED, GREEN, SKY = (250, 0, 0), (0, 250, 0), (0, 0, 250)
DARK, GRAY = (20, 20, 20), (90, 90, 90)


def plain(colours: list) -> np.ndarray:
    """Images of one colour each, uint8 (..., 8, 8, 3)."""
    colours = np.array(colours, dtype=np.uint8)
    return np.broadcast_to(colours[..., None, None, :], (*colours.shape[:-1], 8, 8, 3))


def draw_grid(path: Path, class_names: list[str], columns: int = 3) -> None:
    neighbour_grid(
        queries=plain([DARK, GRAY]),
        neighbours=plain([[RED, GREEN, SKY], [GREEN, RED, SKY]]),
        similarities=np.array([[1.0, 0.707, 0.0], [0.994, 0.25, -0.5]]),
        query_labels=np.array([0, 1]),
        neighbour_labels=np.array([[0, 1, 0], [1, 0, 0]]),
        class_names=class_names,
        bank_size=1234,
        path=path,
        columns=columns,
    )


@pytest.mark.parametrize("class_names", [["cat", "dog, hound"], []], ids=["labels", "no labels"])
def test_the_grid_shows_queries_and_their_neighbours_and_marks_other_classes(class_names, tmp_path):
    path = tmp_path / "grid"
    draw_grid(path, class_names)
    shown = {colour for _, colour in png(path).getcolors(maxcolors=1_000_000)}
    assert {DARK, GRAY, RED, GREEN, SKY} <= shown
    assert len(svg(path).findall(".//svg:image", NS)) == 2 * (1 + 3)
    texts = words(path)
    assert texts[:2] == ["query", "nearest of 1,234 training images, with cosine similarity"]
    assert [word for word in texts if re.fullmatch(r"[-−]?\d\.\d\d", word)] == [
        *("1.00", "0.71", "0.00"),
        *("0.99", "0.25", "-0.50"),
    ]
    # Each query's class and then those of its neighbours, the other ones marked.
    names = [word for word in texts if word in ("cat", "dog", "≠")]
    if class_names:
        first, second = ["cat", "cat", "dog", "≠", "cat"], ["dog", "dog", "cat", "≠", "cat", "≠"]
        assert names == first + second
        assert frames(path, VERMILION) == 3
    else:
        assert frames(path, VERMILION) == len(names) == 0


def test_rows_of_images_have_their_words_their_numbers_and_the_frames_of_what_is_marked(tmp_path):
    path = tmp_path / "rows"
    red, green, sky, dark, gray = plain([RED, GREEN, SKY, DARK, GRAY])
    first = [Tile(red, "train 3", "0.990"), Tile(green, "test 14000000000", "0.991", VERMILION)]
    image_rows("What was found", [first, [Tile(sky, "train 4"), Tile(dark, "train 5"), Tile(gray, "train 6")]], path)
    shown = {colour for _, colour in png(path).getcolors(maxcolors=1_000_000)}
    assert {DARK, GRAY, RED, GREEN, SKY} <= shown
    assert len(svg(path).findall(".//svg:image", NS)) == 5
    texts = [word for word in words(path) if word]
    assert texts == ["What was found", "train 3", "0.990", "test 140000…", "0.991", "train 4", "train 5", "train 6"]
    assert frames(path, VERMILION) == 1


def test_a_bank_with_fewer_images_than_columns_leaves_the_last_columns_empty(tmp_path):
    draw_grid(tmp_path / "full", [])
    draw_grid(tmp_path / "wide", [], columns=7)
    assert len(svg(tmp_path / "wide").findall(".//svg:image", NS)) == 2 * (1 + 3)
    widths = [float(svg(tmp_path / name).find(".//svg:image", NS).get("width")) for name in ("full", "wide")]
    assert widths[1] < 0.6 * widths[0]


PARAMS = ViewParams((2, 4, 10, 20), (("hue", -0.0512), ("contrast", 1.25)), gray=True, blur=1.25, flip=True)


def test_a_draw_is_described_with_its_jitter_in_order():
    assert describe_view(PARAMS, width=40, height=20).splitlines() == [
        *("crop 25 %: 20 × 10 px", "at 4, 2", "hue −0.05 turns", "contrast × 1.25", "gray, blur σ 1.2 px, flipped"),
    ]
    solarized = describe_view(replace(PARAMS, solarize=True), 40, 20)
    assert solarized.splitlines()[4:] == ["gray, blur σ 1.2 px,", "solarized, flipped"]
    assert describe_view(ViewParams((0, 0, 20, 40), (), False, 0.0, False), 40, 20) == "crop 100 %: 40 × 20 px\nat 0, 0"


def test_pairs_of_views_are_drawn_beside_the_image_with_its_crops(tmp_path):
    path = tmp_path / "views"
    views = [torch.full((3, 8, 8), value, dtype=torch.uint8) for value in (30, 200)]
    view_pairs([DrawnImage(Image.new("RGB", (40, 20), RED), [PARAMS, PARAMS], views)] * 2, path)
    assert {RED, (30, 30, 30), (200, 200, 200)} <= {c for _, c in png(path).getcolors(maxcolors=1_000_000)}
    assert len(svg(path).findall(".//svg:image", NS)) == 2 * 3
    assert frames(path, BLUE) == frames(path, VERMILION) == 2 * 2  # a crop and a view
    # The crop is half as wide as the image, half as high, and begins a tenth from its corner.
    boxes = {}
    for d, colour in re.findall(r'<path d="([^"]*z)\s*"[^>]*stroke: (#\w+)', path.with_suffix(".svg").read_text()):
        corners = np.array(re.findall(r"[ML] (\S+) (\S+)", d), dtype=float)
        boxes.setdefault(colour, []).append((*corners.min(axis=0), *np.ptp(corners, axis=0)))
    (x, y, width, height), (left, top, w, h) = (
        next(b for c, b in boxes.items() if c not in (BLUE, VERMILION))[0],
        boxes[BLUE][0],
    )
    assert (w / width, h / height, (left - x) / width, (top - y) / height) == pytest.approx(
        (0.5, 0.5, 0.1, 0.1), abs=1e-3
    )


def test_one_view_is_drawn_beside_the_image_with_its_crop_and_no_key(tmp_path):
    path = tmp_path / "views"
    view = torch.full((3, 8, 8), 30, dtype=torch.uint8)
    view_pairs([DrawnImage(Image.new("RGB", (40, 20), RED), [PARAMS], [view])] * 2, path)
    assert len(svg(path).findall(".//svg:image", NS)) == 2 * 2
    assert (frames(path, BLUE), frames(path, VERMILION)) == (2 * 2, 0)
    assert [word for word in words(path) if word][:2] == ["image and crop", "view"]


def clusters(n: int, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.arange(n) % classes
    noise = torch.randn(n, 32, generator=torch.Generator().manual_seed(0))
    return F.normalize(10 * F.one_hot(labels, 32) + noise, dim=1), labels


def dots(path: Path) -> list[tuple[str, float, float]]:
    """Colour and place of every dot."""
    groups = svg(path).findall(".//svg:g", NS)
    uses = [use for group in groups if group.get("id", "").startswith("PathCollection") for use in group.iter()]
    found = [(use.get("style"), use.get("x"), use.get("y")) for use in uses if use.get("x")]
    return [(re.search(r"fill: (#\w+)", style)[1], float(x), float(y)) for style, x, y in found]


def test_images_of_a_class_lie_together_in_its_colour_and_are_named(tmp_path):
    features, labels = clusters(60, 3)
    embedding(features, labels, ["cat", "dog, hound", "fox"], tmp_path / "tsne")
    shown = [dot for dot in dots(tmp_path / "tsne")]
    places = np.array([dot[1:] for dot in shown if dot[0] in [to_hex(c) for c in COLOURS[:3]]])
    assert len(places) >= 60
    assert {"cat", "dog", "fox", "t-SNE of the features of 60 images, 3 classes"} <= set(words(tmp_path / "tsne"))
    colours = np.array([dot[0] for dot in shown])
    distance = np.linalg.norm(places[:, None] - places[None], axis=2) + 1e6 * np.eye(len(places))
    assert (colours[distance.argmin(axis=1)] == colours).mean() > 0.95
    png(tmp_path / "tsne")


def to_hex(colour: tuple[float, float, float]) -> str:
    return "#" + "".join(f"{round(255 * c):02x}" for c in colour)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_few_images_have_a_tsne_too(n, tmp_path):
    features, labels = clusters(n, 2)
    embedding(features, labels, ["cat", "dog"], tmp_path / "tsne")
    assert len(dots(tmp_path / "tsne")) >= n


def test_collapsed_features_have_one(tmp_path):
    embedding(clusters(1, 1)[0].expand(12, -1), torch.zeros(12, dtype=torch.long), [], tmp_path / "tsne")
    assert len(dots(tmp_path / "tsne")) == 12


def test_many_classes_are_counted_not_named(tmp_path):
    features, labels = clusters(63, 21)
    embedding(features, labels, [f"class {i}" for i in range(30)], tmp_path / "tsne")
    assert words(tmp_path / "tsne") == ["t-SNE of the features of 63 images, 21 classes"]
    assert len({colour for colour, _, _ in dots(tmp_path / "tsne")}) == 21


def counts(classes: int, *wrong: tuple[int, int, int]) -> torch.Tensor:
    """Nine images of each class that are right, and some of class i that are called j."""
    pairs = [(i, i) for i in range(classes) for _ in range(9)] + [(i, j) for i, j, n in wrong for _ in range(n)]
    truth, called = torch.tensor(pairs).T
    return score(called[:, None], truth, classes).confusion


@pytest.mark.parametrize("classes", [3, 10, 20, 30, 40])
def test_the_confusion_matrix_names_all_classes_and_counts_those_of_twenty(classes, tmp_path):
    path = tmp_path / "confusion"
    confusion(counts(classes, (1, 0, 7)), [f"class {i}" for i in range(classes)], path)
    shown = words(path)
    assert shown.count("7") == (classes <= 20)
    assert shown.count("9") == (classes if classes <= 20 else 0)
    assert all(shown.count(f"class {i}") == 2 for i in range(classes))  # as a row and as a column
    assert 1000 < png(path).height < 1600
    svg(path)


@pytest.mark.parametrize("classes", [41, 300, 50_000])
def test_of_many_classes_the_pairs_that_are_confused_most_are_drawn(classes, tmp_path):
    path = tmp_path / "confusion"
    many = [(i, i + 1, 40 - i) for i in range(30)]
    confusion(counts(classes, *many), [f"class {i}, synonym" for i in range(classes)], path)
    shown = words(path)
    assert [word for word in shown if "is called" in word] == [f"class {i} is called class {i + 1}" for i in range(25)]
    numbers = shown[-25 - 1 : -1]
    assert numbers == [str(40 - i) for i in range(25)]
    drawn, wrong = sum(range(16, 41)), sum(range(11, 41))
    assert shown[-1] == f"{drawn:,} of {wrong:,} mistakes, the most frequent; {classes:,} classes"
    assert png(path).height < 1600
    assert (path.with_suffix(".svg")).stat().st_size < 1_000_000


def test_many_classes_without_a_mistake_have_a_picture(tmp_path):
    confusion(counts(50), [f"class {i}" for i in range(50)], tmp_path / "confusion")
    assert "0 of 0 mistakes, the most frequent; 50 classes" in words(tmp_path / "confusion")


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    """The figures that are saved, to be measured."""
    kept, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda fig, *args, **kwargs: (kept.append(fig), save(fig, *args, **kwargs))[1]
    )
    return kept


@pytest.mark.parametrize(
    "knn_k",
    [
        pytest.param(None, marks=pytest.mark.slow),
        pytest.param([200, 20], marks=pytest.mark.slow),
        [200, 5, 10, 20, 50, 100],
    ],
)
def test_no_legend_lies_on_curves_and_no_word_is_cut(knn_k, drawn, tmp_path):
    more = {f"eval_knn_top1_k{k}": 61.25 for k in (knn_k or [])[1:]}
    regrouped = {"eval_contrast_top1": 12.53}
    k = knn_k and knn_k[0]
    training_curves([*HISTORY, {"epoch": 1.0} | HEALTH | regrouped | more], 4.17, tmp_path / "curves", k)
    fig = drawn[0]
    renderer = FigureCanvasAgg(fig).get_renderer()
    page = fig.bbox
    legends = 0
    for axis in fig.axes:
        title = axis.get_title("left")
        assert title
        if legend := axis.get_legend():
            legends += 1
            box = legend.get_window_extent(renderer)
            assert box.y0 >= axis.bbox.y1 - 1e-6, title
            assert box.y1 <= axis._left_title.get_window_extent(renderer).y0 + 2, title
        box = axis.get_tightbbox(renderer)  # of all that is drawn of it
        assert page.x0 <= box.x0 <= box.x1 <= page.x1, title
        assert page.y0 <= box.y0 <= box.y1 <= page.y1, title
        others = [other.get_tightbbox(renderer) for other in fig.axes if other is not axis]
        assert not any(box.overlaps(other) for other in others), title
    assert legends == 4


@pytest.mark.filterwarnings("ignore:Glyph .* missing from font")
@pytest.mark.parametrize("name", ["golden retriever", "mushroom_p", "MMMMMMMMMMMMMMM", "猫" * 12])
def test_no_name_lies_on_a_number_or_on_the_name_beside_it(name, drawn, tmp_path):
    pixels = np.zeros((2, 7, 8, 8, 3), np.uint8)
    similarities, labels = np.full((2, 7), -0.97), np.ones((2, 7), int)
    neighbour_grid(
        pixels[:, 0], pixels, similarities, np.zeros(2, int), labels, [name, f"{name}, 2"], 9, tmp_path / "grid"
    )
    image_rows("What was found", [[Tile(pixels[0, 0], name, "0.999")] * 8], tmp_path / "rows")
    for fig in drawn[::2]:
        fig.set_dpi(DPI)
        renderer = FigureCanvasAgg(fig).get_renderer()
        texts = [text for text in fig.axes[0].texts if text.get_text() not in ("≠", "")]
        boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in texts]
        assert len(boxes) > 16
        assert [(a, b) for i, (a, box) in enumerate(boxes) for b, other in boxes[:i] if box.overlaps(other)] == []


@pytest.mark.parametrize("side", [8, 32, 60, 96])
def test_small_images_are_enlarged_in_whole_squares_of_their_own_colours(side, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    path = tmp_path / "grid"
    neighbour_grid(noise[None], noise[None, None], np.ones((1, 1)), np.zeros(1), np.zeros((1, 1)), [], 1, path)
    shown = svg(path).find(".//svg:image", NS)
    href = next(value for name, value in shown.attrib.items() if name.endswith("href"))
    with Image.open(io.BytesIO(base64.b64decode(href.partition(",")[2]))) as image:
        pixels = np.asarray(image.convert("RGB"))
    assert min(pixels.shape[:2]) >= 128  # 64 px of a README
    assert {tuple(colour) for colour in pixels.reshape(-1, 3)} == {tuple(colour) for colour in noise.reshape(-1, 3)}


NAMES = ["$\\frac{a$", "été", "<b>&amp;", "a" * 200, "x_{", "100 %"]


def test_any_class_name_is_drawn_as_it_is_written(tmp_path):
    names = NAMES[:3] + NAMES[4:]
    confusion(counts(5), names, tmp_path / "matrix")
    confusion(counts(50, *((i, i + 1, 1) for i in range(4))), names * 10, tmp_path / "pairs")
    draw_grid(tmp_path / "grid", NAMES[:2])
    features, labels = clusters(30, 5)
    embedding(features, labels, names, tmp_path / "tsne")
    for name in ("matrix", "tsne"):
        shown = {
            word.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&") for word in words(tmp_path / name)
        }
        assert set(names) <= shown, name
    assert "$\\frac{a$" in words(tmp_path / "grid")


LONG = "a_class_of_a_name_that_is_long_"


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (["dog, hound", "cat, tom"], ["dog", "cat"]),
        (["maillot", "maillot, tank suit", "dog, hound"], ["maillot", "maillot, tank suit", "dog"]),
        (["crane", "crane", "dog"], ["crane 0", "crane 1", "dog"]),
        ([f"{LONG}1", f"{LONG}2"], ["a_class_o…_is_long_1", "a_class_o…_is_long_2"]),
        ([f"{LONG}1{LONG}", f"{LONG}2{LONG}"], ["a_class_of_a_name… 0", "a_class_of_a_name… 1"]),
        ([f"{LONG}1"], ["a_class_of_a_name_t…"]),
        (["\x1b, a", "\x1b, b"], ["\\x1b, a", "\\x1b, b"]),
        ([], []),
    ],
)
def test_no_two_classes_are_called_alike_in_a_figure(names, shown):
    assert short_names(names, 20) == shown
    assert all(len(name) <= 20 for name in shown)


def test_classes_that_share_a_synonym_can_be_told_apart_in_every_figure(tmp_path):
    names = ["maillot", "maillot, tank suit"]
    confusion(counts(50, (0, 1, 5)), names + [f"class {i}" for i in range(48)], tmp_path / "pairs")
    assert "maillot is called maillot, tank suit" in words(tmp_path / "pairs")
    confusion(counts(2), names, tmp_path / "matrix")
    draw_grid(tmp_path / "grid", names)
    features, labels = clusters(30, 2)
    embedding(features, labels, names, tmp_path / "tsne")
    draw_bars({"": {f"{LONG}1": 50.0, f"{LONG}2": 60.0, "\x1b": 40.0}}, "IoU", tmp_path / "bars")
    for figure, shown in {
        "matrix": ("maillot", "maillot…ank suit"),
        "grid": ("maillot", "maill… suit"),
        "tsne": ("maillot", "maillot…ank suit"),
        "bars": ("a_class_of_…at_is_long_1", "\\x1b"),
    }.items():
        assert set(shown) <= set(words(tmp_path / figure)), (figure, words(tmp_path / figure))
        svg(tmp_path / figure)  # is XML


def test_signs_that_xml_and_terminals_know_are_drawn_as_escapes(tmp_path):
    names = ["\0\x1b[2J", "a-->b", "\u202ec"]
    confusion(counts(3), names, tmp_path / "matrix")
    shown = words(tmp_path / "matrix")
    svg(tmp_path / "matrix")  # is XML
    assert {"\\x00\\x1b[2J", "\\u202ec"} <= set(shown)
