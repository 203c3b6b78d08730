"""Features of a frozen encoder in the evaluation view: the same for the monitor, every probe and the figures.

Shapes: `n` images, `D` feature width, `R` processes.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from modeling_moco import MoCoModel
from modeling_moco.distributed_moco import gather as gather_rows
from modeling_moco.distributed_moco import rank, world_size

from ..data.images import MapImages
from ..engine.files import below, whole_file, write_json
from ..engine.preemption import outlive_signals
from ..engine.results import Feature, behind, encoder_digest
from ..errors import DataError, one_line

COLUMNS = ("features", "label")  # of a file of kept features
Batch = dict[str, torch.Tensor]
ROWS_PER_FILE = 16_384  # what an interrupted extraction repeats at most


@torch.no_grad()
def extract_features(
    model: MoCoModel,
    images: MapImages,
    *,
    feature: Feature = "backbone",
    batch_size: int = 256,
    num_workers: int = 0,
    gather: bool = True,
    kept: list[Batch] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of all images. The processes share the work.

    Arguments are those of `encode_in_order`.

    Returns:
        on the CPU: features as the encoder gives them, float32 (n, D), and labels (n,), -1 for an image without one.
    """
    ranks, n = world_size(), len(images)
    count = n if gather else len(range(rank(), n, ranks))
    batches = encode_in_order(
        model, images, feature=feature, batch_size=batch_size, num_workers=num_workers, gather=gather, kept=kept
    )
    steps = -(-n // (ranks * batch_size))
    quiet = rank() > 0 or steps < 20 or None  # None: a bar on a terminal alone
    features, labels = torch.empty(0), torch.empty(count, dtype=torch.long)
    done = 0
    for x, y in tqdm(batches, desc="features", total=steps, leave=False, disable=quiet, dynamic_ncols=True):
        if done == 0:
            features = torch.empty(count, x.shape[1])  # once, and not as pieces that are joined: it may be gigabytes
        features[done : done + len(x)], labels[done : done + len(x)] = x, y
        done += len(x)
    if not features.isfinite().all():  # nothing is near to one of them: all images would be of one class
        raise ValueError(
            "the model gives images features that are not finite, too large for float32: pass another model, or train it with "
            "a lower learning rate"
        )
    return features, labels


@torch.no_grad()
def encode_in_order(
    model: MoCoModel,
    images: Dataset,
    *,
    feature: Feature = "backbone",
    stage: int | None = None,
    batch_size: int = 256,
    num_workers: int = 0,
    gather: bool = True,
    kept: list[Batch] | None = None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Features and labels of the next images, batch for batch, on the CPU: float32 (N, D), and (N,), -1 without a label.

    The model runs in evaluation mode and is left in the mode it was in. If ranks hold different BatchNorm statistics,
    rank 0's (the saved ones) are broadcast first.

    Args:
        images: "pixel_values" uint8 (3, S, S) and perhaps "labels" by index, as `MapImages` has them.
        feature, stage: see `encode`.
        batch_size: images per process.
        gather: every process gets all rows in the order of the images; else each gets its own, `rank::R`.
        kept: takes the batches as they lie on the device, if it is empty; else they are read from it, without decoding.
    """
    ranks, n = world_size(), len(images)  # type: ignore[arg-type]  # torch's own Dataset declares no length
    mine = range(rank(), -(-n // ranks) * ranks, ranks)
    loader = kept or DataLoader(
        Subset(images, [min(i, n - 1) for i in mine]),  # the last image pads the shares to equal length
        batch_size=batch_size,
        num_workers=num_workers,
        worker_init_fn=outlive_signals,
    )
    if ranks > 1:
        for module in behind(model, feature):
            for buffer in module.buffers():
                dist.broadcast(buffer, src=0)
    training = model.training
    model.eval()
    left = n if gather else len(range(rank(), n, ranks))  # rows, without the padding
    keep = kept.append if kept == [] else None
    for batch in loader:
        batch = {name: batch[name].to(model.device) for name in ("pixel_values", "labels") if name in batch}
        if keep is not None:
            keep(batch)
        x = encode(model, batch["pixel_values"], feature, stage)
        y = batch.get("labels", torch.full((len(x),), -1)).to(model.device)
        if gather:
            x, y = _in_order(x), _in_order(y)
        yield x[:left].cpu(), y[:left].cpu()
        left -= min(left, len(x))
    model.train(training)


def encode(model: MoCoModel, pixel_values: torch.Tensor, feature: Feature, stage: int | None = None) -> torch.Tensor:
    """The chosen feature of a batch, float32 (N, D).

    Args:
        stage: of the backbone, whose map is averaged over all places; None for the pooled output.
    """
    if feature == "head":  # without the predictor, which only queries pass and which turns them to their keys
        return unit(model.projector_q(model.features(pixel_values).pooler_output).float())
    if stage is None:
        return model.features(pixel_values).pooler_output.float()
    hidden = model.features(pixel_values, output_hidden_states=True).hidden_states
    assert hidden is not None
    return hidden[stage].float().mean(dim=(2, 3))


def _in_order(x: torch.Tensor) -> torch.Tensor:
    # Row i of rank r is image i * R + r.
    return gather_rows(x).unflatten(0, (world_size(), len(x))).transpose(0, 1).flatten(0, 1)


def unit(x: torch.Tensor) -> torch.Tensor:
    """Rows at unit length."""
    return F.normalize(x, dim=1)


def cached_features(
    model: MoCoModel,
    images: MapImages,
    folder: Path,
    *,
    feature: Feature = "backbone",
    gather: bool = True,
    **loading: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`extract_features`, kept as Arrow files in a folder named after the model, the images and their view.

    Arguments and returns are those of `extract_features`.

    An interrupted extraction goes on where it was; `datasets.Dataset.from_file` opens a file.

    Raises:
        DataError: a file that is there is damaged.
        ValueError: the features are not finite.
    """
    about = {
        "model": encoder_digest(model, feature),
        "images": images.source._fingerprint,
        "view": repr(images.transform),
        "decoder": repr(getattr(images.decode, "__self__", None)),  # whose limits decide which images others replace
        "feature": feature,
        "n": len(images),
    }
    folder = below(below(folder.parent, folder.name), hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16])
    files = {start: folder / f"{start:09}.arrow" for start in range(0, len(images), ROWS_PER_FILE)}
    missing = {start: path for start, path in files.items() if not path.is_file()}
    if world_size() > 1:  # one process looks for all: another job may be writing the same files
        seen = [missing]
        dist.broadcast_object_list(seen, src=0)
        missing = seen[0]
    if rank() == 0 and missing:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "about.json", about)
    for start, path in tqdm(missing.items(), desc="features", disable=rank() > 0 or len(missing) < 2 or None):
        rows = extract_features(model, images.rows(start, start + ROWS_PER_FILE), feature=feature, **loading)
        if rank() == 0:
            _write(path, *rows)
    if world_size() > 1:
        dist.barrier()
    first, step = (0, 1) if gather else (rank(), world_size())
    count, done = len(range(first, len(images), step)), 0
    features, labels = torch.empty(0), torch.empty(count, dtype=torch.long)
    for start, path in files.items():
        x, y = _read(path, min(ROWS_PER_FILE, len(images) - start), slice((first - start) % step, None, step))
        if done == 0:
            features = torch.empty(count, x.shape[1])
        features[done : done + len(x)], labels[done : done + len(x)] = x, y
        done += len(x)
    return features, labels


def _write(path: Path, features: torch.Tensor, labels: torch.Tensor) -> None:
    values = pa.FixedSizeListArray.from_arrays(pa.array(features.reshape(-1).numpy()), features.shape[1])
    table = pa.table(dict(zip(COLUMNS, (values, labels.numpy()), strict=True)))
    with (
        whole_file(path) as unfinished,
        pa.OSFile(str(unfinished), "wb") as file,
        pa.ipc.new_stream(file, table.schema) as writer,
    ):
        writer.write_table(table)


def _read(path: Path, count: int, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Some of the `count` rows of a file."""
    try:
        with pa.memory_map(str(path)) as file:
            table = pa.ipc.open_stream(file).read_all()
            if len(table) != count or table.column_names != [*COLUMNS]:
                raise pa.ArrowInvalid(f"{len(table):,} rows of {', '.join(table.column_names)}")
            features = table["features"].combine_chunks()
            values = features.values.to_numpy().reshape(count, features.type.list_size)[rows]
            return torch.tensor(values), torch.tensor(table["label"].to_numpy()[rows])
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} is damaged ({one_line(error)}): delete it, and it is made again") from error
