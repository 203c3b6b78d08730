"""A trainer of a tiny model on a few random images, which steps in milliseconds."""

import datasets
import numpy as np
import torch
from PIL import Image
from transformers import TrainerCallback

from modeling_moco import MoCoConfig, MoCoImageProcessor, MoCoModel
from training.data.images import MapImages, StreamedImages
from training.data.memory_images import MemoryImages
from training.data.shards import ShardedRows
from training.trainer import MoCoTrainer, MoCoTrainingArguments
from training.views.device import DeviceViews
from training.views.pil import Views
from training.views.policy import build_policies

# Flags of a run of seconds.
TINY = [
    *("--dataset_name", "digits", "--max_train_samples", "64", "--max_eval_samples", "16", "--image_size", "32"),
    *("--eval_resize", "32", "--queue_size", "64", "--global_batch_size", "16", "--knn_k", "5", "--use_cpu"),
    *("--dataloader_num_workers", "0", "--dataloader_persistent_workers", "False", "--disable_tqdm", "True"),
]
BATCH, IMAGES = 4, 26  # six whole batches and a remainder


def image_rows() -> datasets.Dataset:
    pixels = np.random.default_rng(0).integers(0, 256, (IMAGES, 24, 24, 3), dtype=np.uint8)
    table = {"image": [Image.fromarray(p) for p in pixels], "label": [i % 2 for i in range(IMAGES)]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    return datasets.Dataset.from_dict(table, features=features).cast_column("image", datasets.Image(decode=False))


def tiny_model(seed: int = 0, **kwargs) -> MoCoModel:
    torch.manual_seed(seed)
    return MoCoModel(MoCoConfig(**{"architecture": "test_resnet", "queue_size": 16, "batch_norm": "plain"} | kwargs))


def build(rows, folder, model=None, callback=None, stream=False, memory=False, **kwargs) -> MoCoTrainer:
    defaults = {"num_train_epochs": 2, "eval_strategy": "no", "save_strategy": "no", "logging_steps": 1}
    defaults |= {"disable_tqdm": True}
    args = MoCoTrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        **({"per_device_train_batch_size": BATCH} | defaults | kwargs),
    )
    model = model or tiny_model()
    bank = model.config.dictionary == "bank"  # which has one view of an image, and knows its row
    views = Views(build_policies("v2")[: 1 if bank else 2], 24)
    images: MapImages | MemoryImages | StreamedImages = MapImages(rows, views, args.seed, numbered=bank)
    render = None
    if memory:
        images, render = (
            MemoryImages(rows, views.policies, args.seed, numbered=bank),
            DeviceViews(views.policies, views.size),
        )
    if stream:
        names = {"image": "image", "label": "label"}
        shards = ShardedRows(rows.to_iterable_dataset(num_shards=2), names, [IMAGES // 2] * 2)
        place = {"rank": args.process_index, "world_size": args.world_size}
        images = StreamedImages(shards, views, batch_size=BATCH, buffer_size=8, numbered=bank, **place)
    trainer = MoCoTrainer(model, args, images, MoCoImageProcessor(), render=render)
    if callback:
        trainer.add_callback(callback)
    return trainer


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step
