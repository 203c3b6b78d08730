"""Pictures are files that open, at a size that fits what they show."""

import io

import datasets
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from training.augment import EvaluationView
from training.images import MapImages
from training.plots import neighbour_grid, training_curve

HISTORY = [
    {"epoch": 0.0, "eval_knn_top1": 20.0},
    {"epoch": 0.5, "loss": 4.1, "contrast_top1": 3.0, "learning_rate": 0.03},
    {"epoch": 1.0, "loss": 3.2, "contrast_top1": 30.0, "learning_rate": 0.01},
    {"epoch": 1.0, "eval_knn_top1": 60.0},
    {"epoch": 1.0, "train_runtime": 3.0},
]


def opened(path) -> Image.Image:
    image = Image.open(path)
    image.load()
    assert image.format == "PNG"
    return image.convert("RGB")


@pytest.mark.parametrize("history", [HISTORY, HISTORY[1:3]], ids=["with kNN", "without"])
def test_the_training_curve_is_three_panels_wide(history, tmp_path):
    path = training_curve(history, chance=4.17, path=tmp_path / "curve.png")
    image = opened(path)
    assert path == tmp_path / "curve.png"
    assert image.width > 1000
    assert 2 < image.width / image.height < 5
    assert len(image.getcolors(maxcolors=1_000_000)) > 50  # lines and letters, not an empty page


def images_of(colours, labels) -> MapImages:
    rows = []
    for colour in colours:
        file = io.BytesIO()
        Image.new("RGB", (8, 8), colour).save(file, "PNG")
        rows.append({"bytes": file.getvalue(), "path": None})
    features = datasets.Features({"image": datasets.Image(decode=False), "label": datasets.Value("int64")})
    return MapImages(
        datasets.Dataset.from_dict({"image": rows, "label": labels}, features=features), EvaluationView(8, 8)
    )


def test_the_neighbour_grid_shows_queries_and_their_neighbours_only(tmp_path):
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0), (0, 250, 250)]
    bank, queries = images_of(colours, [0, 1, 0, 1, 0]), images_of([(20, 20, 20), (90, 90, 90)], [0, 1])
    bank_features = F.normalize(torch.tensor([[1.0, 0], [1, 1], [0, 1], [-1, 1], [-1, 0]]), dim=1)
    path = neighbour_grid(
        queries, bank, bank_features[:2], bank_features, ["cat", "dog"], tmp_path / "grid.png", neighbours=3
    )
    image = opened(path)
    assert image.width > 300
    assert 1 < image.width / image.height < 3  # two rows of four
    shown = {colour for _, colour in image.getcolors(maxcolors=1_000_000)}
    # Both queries are nearer to the first three than to the others.
    assert {(20, 20, 20), (90, 90, 90), *colours[:3]} <= shown
    assert not shown & set(colours[3:])
