"""MoCoTrainer: transformers' Trainer with the official optimisation and the MoCo updates around each step."""

import logging
import math
import time
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import IntervalStrategy, SchedulerType

from modeling_moco import MoCoModel
from modeling_moco.distributed_moco import world_size

from .data import MapImages, NormalizeOnDevice, StreamedImages
from .knn import evaluate_knn
from .schedule import epoch_schedule

logger = logging.getLogger(__name__)


@dataclass
class MoCoTrainingArguments(TrainingArguments):
    """TrainingArguments with the defaults of MoCo v2: SGD, weight decay on everything, a cosine in whole epochs."""

    _argument_group_name = "training"

    output_dir: str | None = field(default=None, metadata={"help": "by default runs/<recipe>"})
    global_batch_size: int | None = field(
        default=None,
        metadata={"help": "images per optimizer step over all devices; instead of per_device_train_batch_size"},
    )
    num_train_epochs: float = field(default=200, metadata={"help": "passes over the images"})
    learning_rate: float = field(default=0.03, metadata={"help": "0.03 for a global batch of 256"})
    weight_decay: float = field(default=1e-4, metadata={"help": "on all parameters, BatchNorm and biases included"})
    lr_milestones: list[int] | None = field(
        default=None, metadata={"help": "epochs at which the rate drops to a tenth (v1: 120 160), instead of the cosine"}
    )
    eval_strategy: str = field(default="epoch", metadata={"help": "when to run the kNN monitor: no, epoch"})
    eval_every_n_epochs: int = field(default=1, metadata={"help": "epochs between two kNN evaluations"})
    knn_k: int = field(default=200, metadata={"help": "neighbours that vote in the kNN monitor"})
    knn_temperature: float = field(default=0.07, metadata={"help": "temperature of their votes"})
    seed: int = field(default=0, metadata={"help": "of weights, order and views"})
    per_device_eval_batch_size: int = field(default=256, metadata={"help": "images per device in the kNN monitor"})
    save_strategy: str = field(default="epoch", metadata={"help": "when to save a checkpoint: no, steps, epoch"})
    save_total_limit: int | None = field(default=2, metadata={"help": "newest checkpoints to keep"})
    logging_steps: float = field(default=10, metadata={"help": "optimizer steps between two log entries"})

    # Where transformers' own defaults would train something else than MoCo.
    optim: str = field(default="sgd", metadata={"help": "the papers use SGD"})
    optim_args: str | None = field(default="momentum=0.9", metadata={"help": "arguments of the optimizer"})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "cosine: the official one, in whole epochs"})
    max_grad_norm: float = field(default=0.0, metadata={"help": "0: no clipping"})
    remove_unused_columns: bool = field(default=False, metadata={"help": "must stay off: views have no columns"})
    dataloader_drop_last: bool = field(default=True, metadata={"help": "must stay on: the queue needs whole batches"})
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "every parameter is used"})
    ddp_broadcast_buffers: bool | None = field(
        default=False, metadata={"help": "off: each rank keeps its BatchNorm statistics, and equal queues need no copy"}
    )
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "off: a NaN loss is shown"})

    def __post_init__(self):
        super().__post_init__()
        if self.eval_every_n_epochs < 1:
            raise ValueError(f"eval_every_n_epochs ({self.eval_every_n_epochs}) must be at least 1")
        if self.global_batch_size is not None:
            parts = self.world_size * self.gradient_accumulation_steps
            if self.global_batch_size < 1 or self.global_batch_size % parts:
                raise ValueError(
                    f"global_batch_size ({self.global_batch_size}) must be a positive multiple of {parts} "
                    f"({self.world_size} processes x {self.gradient_accumulation_steps} accumulation steps)"
                )
            self.per_device_train_batch_size = self.global_batch_size // parts
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # there is nothing to copy to, and torch would warn every epoch

    @property
    def images_per_step(self) -> int:
        """Images of one optimizer step over all processes."""
        return self.per_device_train_batch_size * self.world_size * self.gradient_accumulation_steps

    @property
    def images_per_enqueue(self) -> int:
        """Keys that enter the queue at once: one micro-batch of all processes."""
        return self.per_device_train_batch_size * self.world_size


class MoCoCallback(TrainerCallback):
    """The two things that must happen outside a step: the momentum update, and telling the data which epoch it is."""

    def __init__(self, train_dataset: MapImages | StreamedImages):
        self.train_dataset = train_dataset

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.train_dataset.set_epoch(int(state.epoch))

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        # Before the first micro-batch of every optimizer step, with the weights that the last one left: official order.
        model.update_key_encoder()

    def on_epoch_end(self, args, state, control, **kwargs):
        if args.eval_strategy == IntervalStrategy.EPOCH:
            last = state.global_step >= state.max_steps
            control.should_evaluate = last or round(state.epoch) % args.eval_every_n_epochs == 0


class MoCoProgressCallback(ProgressCallback):
    """One bar with the newest numbers in it, and a line at every evaluation."""

    NAMES = {
        "loss": ("loss", "{:.3f}"),
        "contrast_top1": ("contrast", "{:.1f}%"),
        "eval_knn_top1": ("kNN", "{:.1f}%"),
        "images_per_second": ("images/s", "{:.0f}"),
    }

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.shown: dict[str, str] = {}
        if self.training_bar is not None:
            self.training_bar.update(state.global_step)  # of a resumed run
            self.current_step = state.global_step

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is None:
            return
        for key, (name, form) in self.NAMES.items():
            if key in logs:
                self.shown[name] = form.format(logs[key])
        self.training_bar.set_postfix(self.shown)
        if "eval_knn_top1" in logs:
            numbers = "  ".join(f"{name} {value}" for name, value in self.shown.items())
            self.training_bar.write(f"epoch {logs['epoch']:g} of {args.num_train_epochs:g}: {numbers}")


class MoCoTrainer(NormalizeOnDevice, Trainer):
    """Pretrains a [`MoCoModel`].

    Args:
        model: in float32 (mixed precision comes from `args.bf16`).
        args: see [`MoCoTrainingArguments`].
        train_dataset: images with the `TwoViews` transform.
        processing_class: the image processor, whose mean and standard deviation normalise the views; it is saved beside
            every checkpoint.
        knn_bank, knn_queries: labelled images with the `EvaluationView` transform, for `evaluate()`.

    Raises:
        ValueError: the queue is smaller than a batch, the images are fewer than a batch, or the weights are in 16 bits.
    """

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
            callbacks=[MoCoCallback(train_dataset)],
        )
        self.knn_bank = knn_bank
        self.class_names: list[str] | None = None
        if not args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(MoCoProgressCallback)
        self._contrast = torch.zeros(3, device=args.device)  # hits at 1, hits at 5, queries since the last log
        self._logged_at, self._logged_step = time.perf_counter(), 0

    def train(self, *args, **kwargs):
        if world_size() > 1:  # ranks may have drawn different queues; from here on they stay equal
            for buffer in self.model.dictionary.buffers():
                dist.broadcast(buffer, src=0)
        self._logged_at = time.perf_counter()
        return super().train(*args, **kwargs)

    def get_train_dataloader(self):
        if not isinstance(self.train_dataset, StreamedImages):
            return super().get_train_dataloader()
        # A stream divides itself over processes and workers: accelerate would divide it again.
        workers = min(self.args.dataloader_num_workers, self.train_dataset.max_workers)
        if workers < self.args.dataloader_num_workers:
            logger.warning(
                "dataloader_num_workers (%d) is more than the shards per process (%d): the others would idle. Split the "
                "dataset into more files to use them.",
                self.args.dataloader_num_workers,
                workers,
            )
        return torch.utils.data.DataLoader(
            self.train_dataset,
            batch_size=self.args.per_device_train_batch_size,
            num_workers=workers,
            pin_memory=self.args.dataloader_pin_memory,
            persistent_workers=self.args.dataloader_persistent_workers,
            drop_last=True,
        )

    def get_decay_parameter_names(self, model) -> list[str]:
        return [name for name, _ in model.named_parameters()]  # the official optimiser decays everything

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        args = self.args
        official = args.lr_milestones or (
            args.lr_scheduler_type == SchedulerType.COSINE and not args.get_warmup_steps(num_training_steps)
        )
        if self.lr_scheduler is None and official:
            steps_per_epoch = math.ceil(self._steps_per_epoch())
            epochs = math.ceil(num_training_steps / steps_per_epoch)
            self.lr_scheduler = epoch_schedule(optimizer or self.optimizer, steps_per_epoch, epochs, args.lr_milestones)
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def _steps_per_epoch(self) -> float:
        args = self.args
        ranks = 1 if isinstance(self.train_dataset, StreamedImages) else args.world_size
        batches = len(self.train_dataset) // (args.per_device_train_batch_size * ranks)
        return batches / args.gradient_accumulation_steps

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        self._keys = outputs.key_embeds
        with torch.no_grad():
            rank = (outputs.logits[:, 1:] > outputs.logits[:, :1]).sum(dim=1)  # negatives that beat the positive
            self._contrast += torch.stack([(rank < 1).sum(), (rank < 5).sum(), torch.tensor(len(rank)).to(rank)])
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.model.dictionary.enqueue(self._keys)  # after backward, which needs the queue as the forward saw it
        return loss

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        """Accuracy of the kNN monitor in per cent: `{"eval_knn_top1": ...}`."""
        started = time.perf_counter()
        metrics = evaluate_knn(
            self.model,
            self.knn_bank,
            self.eval_dataset if eval_dataset is None else eval_dataset,
            self.processing_class,
            k=self.args.knn_k,
            temperature=self.args.knn_temperature,
            batch_size=self.args.per_device_eval_batch_size,
            num_workers=self.args.dataloader_num_workers,
        )
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
        now, step = time.perf_counter(), self.state.global_step
        speed = (step - self._logged_step) * self.args.images_per_step / (now - self._logged_at)
        self._logged_at, self._logged_step = now, step
        if world_size() > 1:
            dist.all_reduce(self._contrast)
        top1, top5, queries = self._contrast.tolist()
        self._contrast.zero_()
        return {"contrast_top1": 100 * top1 / queries, "contrast_top5": 100 * top5 / queries, "images_per_second": speed}


def _check_sizes(model: MoCoModel, args: MoCoTrainingArguments, images: MapImages | StreamedImages) -> None:
    if args.n_gpu > 1:
        raise ValueError(f"{args.n_gpu} GPUs in one process: start one process per GPU with `accelerate launch`")
    if model.dtype != torch.float32:
        raise ValueError(f"the model is in {model.dtype}: load it in float32, the momentum update needs it, and pass --bf16")
    if model.config.queue_size < args.images_per_enqueue:
        raise ValueError(
            f"queue_size ({model.config.queue_size}) is smaller than the global batch ({args.images_per_enqueue}): "
            "raise it or lower the batch"
        )
    if isinstance(images, StreamedImages):
        too_few = images.batches == 0
    else:
        too_few = len(images) < args.images_per_enqueue
    if too_few:
        raise ValueError(
            f"the dataset ({len(images)} images) is smaller than the global batch ({args.images_per_enqueue}): "
            "lower the batch or use more images"
        )
