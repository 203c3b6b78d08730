"""MoCoTrainer: the momentum update before each step, the queue after it, and a kNN monitor."""

import logging
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl
from transformers.trainer_utils import IntervalStrategy

from modeling_moco import MoCoModel
from modeling_moco.distributed_moco import world_size

from .augment import seeded_generator
from .checkpoints import outlive_sigterm
from .features import Feature
from .images import MapImages, StreamedImages
from .knn import KNNArguments, evaluate_knn
from .sgd_trainer import SGDTrainer, SGDTrainingArguments

logger = logging.getLogger(__name__)


@dataclass
class MoCoTrainingArguments(SGDTrainingArguments):
    """The training of MoCo v2: a cosine in whole epochs, 0.03 for 256 images, and a kNN monitor."""

    num_train_epochs: float = field(default=200, metadata={"help": "passes over the images"})
    learning_rate: float = field(default=0.03, metadata={"help": "0.03 for a global batch of 256"})
    weight_decay: float = field(default=1e-4, metadata={"help": "on all parameters, BatchNorm and biases included"})
    eval_strategy: str = field(default="epoch", metadata={"help": "when to run the kNN monitor: no, epoch"})
    eval_every_n_epochs: int = field(default=1, metadata={"help": "epochs between two kNN evaluations"})
    knn_k: list[int] = field(
        default_factory=lambda: [200],
        metadata={"help": "neighbours that vote in the kNN monitor; several are compared"},
    )
    knn_temperature: float = field(default=0.07, metadata={"help": "temperature of their votes"})
    knn_features: Feature = field(default="backbone", metadata={"help": "what the monitor compares: backbone or head"})
    dataloader_drop_last: bool = field(default=True, metadata={"help": "must stay on: the queue needs whole batches"})
    ddp_broadcast_buffers: bool | None = field(
        default=False, metadata={"help": "off: each rank keeps its BatchNorm statistics, and equal queues need no copy"}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.eval_every_n_epochs < 1:
            raise ValueError(f"eval_every_n_epochs ({self.eval_every_n_epochs}) must be at least 1")
        _ = self.knn  # checks its values

    @property
    def knn(self) -> KNNArguments:
        """The monitor's settings."""
        return KNNArguments(
            k=self.knn_k,
            temperature=self.knn_temperature,
            features=self.knn_features,
            batch_size=self.per_device_eval_batch_size,
            num_workers=self.dataloader_num_workers,
            seed=self.seed,
        )


class MoCoCallback(TrainerCallback):
    """What happens around the steps: the momentum update, when to log and evaluate."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        # Before the first micro-batch of every optimizer step, with the weights that the last one left: official order.
        model.update_key_encoder()
        # The same order on all processes, whatever their seeds, and after a resume.
        model.shuffle_generator = seeded_generator(state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:
            control.should_log = True  # a run shorter than logging_steps has a loss too

    def on_epoch_end(self, args, state, control, **kwargs):
        if args.eval_strategy == IntervalStrategy.EPOCH:
            last = state.global_step >= state.max_steps
            control.should_evaluate = last or round(state.epoch) % args.eval_every_n_epochs == 0


class MoCoTrainer(SGDTrainer):
    """Pretrains a [`MoCoModel`].

    Args:
        model: in float32 (mixed precision comes from `args.bf16`).
        args: see [`MoCoTrainingArguments`].
        train_dataset: images with the `TwoViews` transform.
        processing_class: the image processor, saved beside every checkpoint.
        knn_bank, knn_queries: labelled images with the `EvaluationView` transform, for `evaluate()`.

    Raises:
        ValueError: the queue is smaller than a batch, the images are fewer than a batch, or the weights are in 16 bits.
    """

    control: TrainerControl

    def __init__(
        self,
        model: MoCoModel,
        args: MoCoTrainingArguments,
        train_dataset: MapImages | StreamedImages,
        processing_class,
        knn_bank: MapImages | None = None,
        knn_queries: MapImages | None = None,
    ):
        _check_sizes(model, args, train_dataset)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=knn_queries,
            processing_class=processing_class,
            callbacks=[MoCoCallback()],
        )
        self.knn_bank = knn_bank
        self._hits, self._queries, self._images = torch.zeros(2, device=args.device), 0, 0  # since the last log
        self._logged_at = time.perf_counter()

    def train(self, *args, **kwargs):
        if world_size() > 1:  # ranks may have drawn different queues; from here on they stay equal
            for buffer in self.model.dictionary.buffers():
                dist.broadcast(buffer, src=0)
        self._logged_at = time.perf_counter()
        return super().train(*args, **kwargs)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self.args.process_index > 0:  # the statistics of rank 0 are in the model's file
            save_file(self._statistics(), f"{output_dir}/statistics_{self.args.process_index}.safetensors")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        own = Path(resume_from_checkpoint) / f"statistics_{self.args.process_index}.safetensors"
        if own.is_file():  # a run on fewer processes did not write it
            for name, tensor in load_file(own).items():
                self._statistics()[name].copy_(tensor)

    def _statistics(self) -> dict[str, torch.Tensor]:
        norms = [(n, m) for n, m in self.model.named_modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
        return {f"{prefix}.{name}": buffer for prefix, norm in norms for name, buffer in norm.named_buffers()}

    def build_train_dataloader(self) -> DataLoader:
        if not isinstance(self.train_dataset, StreamedImages):
            return super().build_train_dataloader()
        # A stream divides itself over processes and workers: accelerate would divide it again.
        shards, readers = self.train_dataset.shards, world_size() * max(1, self.args.dataloader_num_workers)
        if shards < readers and self.is_world_process_zero():
            logger.warning(
                "the stream has %d files for %d workers (all processes together): each file is read by several, past the "
                "images of the others. Split the dataset into more files, or lower dataloader_num_workers.",
                shards,
                readers,
            )
        return DataLoader(
            self.train_dataset,
            batch_size=self.args.per_device_train_batch_size,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            persistent_workers=self.args.dataloader_persistent_workers,
            drop_last=True,
            worker_init_fn=outlive_sigterm,
        )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        self._keys = outputs.key_embeds
        with torch.no_grad():
            # Negatives that the positive does not beat: ties and NaN count, or a collapsed run would look perfect.
            rank = (~(outputs.logits[:, 1:] < outputs.logits[:, :1])).sum(dim=1)
            self._hits += torch.stack([(rank < 1).sum(), (rank < 5).sum()])
            self._queries += len(rank)
            self._images += len(inputs["pixel_values"])
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.model.dictionary.enqueue(self._keys)  # after backward, which needs the queue as the forward saw it
        return loss

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        """Accuracy of the kNN monitor in per cent: `{"eval_knn_top1": ...}` for the first k, `eval_knn_top1_k20` for others."""
        assert self.knn_bank is not None, "evaluate() needs knn_bank and knn_queries"
        started = time.perf_counter()
        queries = self.eval_dataset if eval_dataset is None else eval_dataset
        results = evaluate_knn(self.model, self.knn_bank, queries, self.args.knn)
        names = ["knn_top1", *(f"knn_top1_k{k}" for k in self.args.knn_k[1:])]
        metrics = {name: result.value for name, result in zip(names, results, strict=True)}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._logged_at += time.perf_counter() - started  # images per second are those of training
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self._training_metrics()
        super().log(logs, start_time)

    def _training_metrics(self) -> dict[str, float]:
        if world_size() > 1:
            dist.all_reduce(self._hits)
        (top1, top5), queries, images = self._hits.tolist(), self._queries * world_size(), self._images * world_size()
        self._hits, self._queries, self._images = torch.zeros_like(self._hits), 0, 0
        seconds, self._logged_at = time.perf_counter() - self._logged_at, time.perf_counter()
        return {
            "contrast_top1": 100 * top1 / queries,
            "contrast_top5": 100 * top5 / queries,
            "images_per_second": images / seconds,
        }


def _check_sizes(model: MoCoModel, args: MoCoTrainingArguments, images: MapImages | StreamedImages) -> None:
    if model.dtype != torch.float32:
        raise ValueError(
            f"the model is in {model.dtype}: load it in float32, the momentum update needs it, and pass --bf16"
        )
    splits = model.config.batch_norm_splits
    if model.config.batch_norm == "split" and args.per_device_train_batch_size % splits:
        raise ValueError(
            f"the batch per process ({args.per_device_train_batch_size}) must be a multiple of batch_norm_splits "
            f"({splits}): change either"
        )
    if model.config.batch_norm == "sync" and args.world_size > 1 and args.device.type == "cpu":
        raise ValueError("batch_norm ('sync') is for GPUs: torch has no SyncBatchNorm on a CPU; choose another")
    micro_batch = args.per_device_train_batch_size * args.world_size
    keys = 2 * micro_batch if model.config.symmetric_loss else micro_batch
    if model.config.queue_size < keys:
        raise ValueError(
            f"queue_size ({model.config.queue_size}) is smaller than the keys of a global batch ({keys}): raise it or lower "
            "the batch"
        )
    if len(images) == 0 or (isinstance(images, MapImages) and len(images) < micro_batch):
        raise ValueError(
            f"the dataset ({images.images_per_epoch} images) is smaller than the global batch ({micro_batch}): lower the "
            "batch or use more images"
        )
