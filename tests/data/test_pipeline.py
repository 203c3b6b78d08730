"""Images of a memory bank come in one view, with the number of the row whose image it is."""

from types import SimpleNamespace

import datasets
import pytest
import torch
from numbered_images import ROWS, number, table, write_parquet
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from training.data.images import MapImages, collate
from training.data.memory_images import MemoryImages
from training.data.pipeline import as_training_images, build_render, training_images
from training.data.sources import DataArguments, load_images
from training.views.pil import Views
from training.views.policy import build_policies

BATCH, SIZE, BROKEN = 3, 16, (0, 3, 4, 11)  # at the start, two in a row, at the end
KINDS = {"map": ("pil", False), "map, cv2": ("cv2", False), "memory": ("device", False)}
KINDS |= {"stream": ("pil", True), "stream of crops": ("device", True)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    broken = dict.fromkeys(BROKEN, b"\0not an image")
    return write_parquet(tmp_path_factory.mktemp("bank"), [range(7), range(7, ROWS)], broken=broken)


def batches_of(folder, kind, bank=True, workers=0, skip=0, rank=0, ranks=1, augmentation="crop", epoch=1) -> list[dict]:
    backend, streaming = KINDS[kind]
    data = DataArguments(
        dataset_name=str(folder),
        augmentation=augmentation,
        view_backend=backend,
        streaming=streaming,
        image_size=SIZE,
        shuffle_buffer=4,
    )
    run = SimpleNamespace(
        seed=5, per_device_train_batch_size=BATCH, process_index=rank, world_size=ranks, dataloader_num_workers=workers
    )
    images = training_images(data, load_images(data), run, bank)
    images.set_epoch(epoch, skip)
    render = build_render(data, compiled=False, bank=bank) or dict
    loader = DataLoader(images, BATCH, num_workers=workers, collate_fn=collate, drop_last=True)
    with_pixels = images.with_pixels if isinstance(images, MemoryImages) else dict
    return [render(with_pixels(batch)) for i, batch in enumerate(loader) if i >= skip]


def shown(batch: dict[str, torch.Tensor]) -> list[int]:
    """Which images the views of a batch show: their crops and flips keep the colours, by which they are numbered."""
    return (batch["pixel_values"][:, 0].float().mean(dim=(1, 2)) / 4).round().int().tolist()


@pytest.mark.parametrize(("kind", "workers"), [*((kind, 0) for kind in KINDS), ("map", 2), ("stream", 2)])
def test_an_image_of_a_bank_comes_with_the_row_that_it_really_is_of(kind, workers, folder):
    seen = []
    for batch in batches_of(folder, kind, workers=workers):
        assert batch.keys() == {"pixel_values", "index"}  # neither labels nor a second view
        assert (batch["index"].dtype, batch["index"].shape) == (torch.int64, (BATCH,))
        assert batch["index"].tolist() == shown(batch)
        seen += batch["index"].tolist()
    assert len(seen) == ROWS
    assert set(seen) == set(range(ROWS)) - set(BROKEN)


def test_the_rows_of_a_stream_have_the_numbers_and_the_views_of_the_indexed_images(folder):
    def views(kind, **settings):
        batches = batches_of(folder, kind, augmentation="v2", **settings)
        return {
            int(i): x.numpy().tobytes() for b in batches for i, x in zip(b["index"], b["pixel_values"], strict=True)
        }

    assert views("map") == views("stream", workers=2)
    parts = [views("stream", rank=rank, ranks=2) for rank in range(2)]
    assert not parts[0].keys() & parts[1].keys()
    assert (parts[0] | parts[1]).items() <= views("map").items()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_stream_has_the_rows_that_it_would_have_had(workers, folder):
    whole = batches_of(folder, "stream", workers=workers)
    resumed = batches_of(folder, "stream", workers=workers, skip=2)
    assert [batch["index"].tolist() for batch in resumed] == [batch["index"].tolist() for batch in whole[2:]]


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_bank_no_batch_has_numbers_and_the_first_of_two_views_is_the_one_of_a_bank(kind, folder):
    alone, both = batches_of(folder, kind)[0], batches_of(folder, kind, bank=False)[0]
    assert both.keys() == {"pixel_values", "key_pixel_values"}
    if kind != "memory":  # there the numbers of an image depend on how many it has
        assert torch.equal(alone["pixel_values"], both["pixel_values"])


# Images of one's own


class Numbered(Dataset):
    def __init__(self, make=lambda image: (image, 1)):
        self.make = make

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, i: int):
        return self.make(Image.new("RGB", (20, 20), (4 * i, 0, 0)))


PROCESSOR = SimpleNamespace(crop_size={"height": SIZE, "width": SIZE})


def colour(image: Image.Image, generator: torch.Generator) -> torch.Tensor:
    return torch.full((3, SIZE, SIZE), number(image), dtype=torch.uint8)


@pytest.mark.parametrize(
    "dataset", [table(range(ROWS)).cast_column("image", datasets.Image()), Numbered()], ids=["", "torch"]
)
def test_images_of_ones_own_know_their_rows_too(dataset):
    own = as_training_images(dataset, PROCESSOR, seed=0, bank=True)
    assert own[3].keys() == {"pixel_values", "index"}
    by_view = as_training_images(dataset, PROCESSOR, seed=0, view=colour, bank=True)
    batch = next(iter(DataLoader(by_view, ROWS, collate_fn=collate)))
    assert batch.keys() == {"pixel_values", "index"}
    assert batch["index"].tolist() == batch["pixel_values"][:, 0, 0, 0].tolist() == list(range(ROWS))
    assert as_training_images(own, PROCESSOR, seed=0, bank=True) is own


@pytest.mark.parametrize("kind", ["torch", "arrow", "pandas", "hidden columns"])
def test_a_format_of_a_dataset_changes_none_of_its_views(kind):
    rows = table(range(ROWS)).cast_column("image", datasets.Image())
    formatted = rows.with_format(None, columns=["label"]) if kind == "hidden columns" else rows.with_format(kind)
    expected, found = (as_training_images(one, PROCESSOR, seed=0) for one in (rows, formatted))
    for i in range(ROWS):
        for name, view in expected[i].items():
            assert torch.equal(found[i][name], view)


def test_a_dataset_with_a_transform_of_its_own_is_refused_in_one_line():
    rows = table(range(ROWS)).cast_column("image", datasets.Image())
    with pytest.raises(ValueError, match=r"train_dataset has a transform .*: take it away by with_format\(None\), and"):
        as_training_images(rows.with_transform(lambda batch: {"pixel_values": batch["image"]}), PROCESSOR, seed=0)


def test_views_of_another_number_than_the_run_takes_are_refused():
    both = MapImages(table(range(4)), Views(build_policies("v2"), SIZE))
    of_dicts = Numbered(lambda image: {"pixel_values": image, "key_pixel_values": image})
    for dataset, name in ((both, "MapImages"), (of_dicts, "Numbered")):
        with pytest.raises(
            ValueError, match=f"one view of an image and the number of its row, which this {name} does not"
        ):
            as_training_images(dataset, PROCESSOR, seed=0, bank=True)
        assert as_training_images(dataset, PROCESSOR, seed=0) is dataset
    one = MapImages(table(range(4)), Views(build_policies("v2")[:1], SIZE), numbered=True)
    with pytest.raises(
        ValueError, match=r"this MapImages gives one view .* for a memory bank: build it with two policies"
    ):
        as_training_images(one, PROCESSOR, seed=0)
