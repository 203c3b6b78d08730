"""MoCoTrainer: the momentum update before each step, the dictionary after it, and a kNN monitor."""

import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, count, islice
from typing import Any, ClassVar, Literal

import datasets
import torch
import torch.distributed as dist
from accelerate import PartialState
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl
from transformers.trainer_utils import IntervalStrategy

from modeling_moco import Dictionary, MoCoModel
from modeling_moco.dictionary_moco import BankDictionary, BatchDictionary, QueueDictionary
from modeling_moco.distributed_moco import gather, rank, world_size

from .cli import INCLUDE_PICTURES
from .data.images import MapImages, StreamedImages, TrainingImages, collate
from .data.memory_images import MemoryImages
from .data.pipeline import OwnView, as_training_images
from .engine.callbacks import ListUnreadable, RankStatistics
from .engine.record import Trackers
from .engine.results import Feature
from .engine.sgd_trainer import PUBLISHING, SGDTrainer, SGDTrainingArguments
from .evaluation.knn import KNNArguments
from .health import Views, key_drift, queue_age, slow_process, uniformity_kernel
from .monitor import Monitor
from .optimization.cuda_graph import Step, StepGraph
from .views.policy import seeded_generator

logger = logging.getLogger(__name__)

VIEWS = ("pixel_values", "key_pixel_values")
# Means over the queries of a batch that are logged with the loss.
STATISTICS = ("contrast_top1", "contrast_top5", "positive_similarity", "hardest_negative_similarity", "uniformity")
LEAK_IMAGES = 512  # of all processes


@dataclass
class MoCoTrainingArguments(SGDTrainingArguments):
    """The training of MoCo v2: a cosine in whole epochs, 0.03 for 256 images, and a kNN monitor."""

    NOT_OFFERED: ClassVar[frozenset[str]] = SGDTrainingArguments.NOT_OFFERED - {*PUBLISHING}
    NOT_READ: ClassVar[dict[str, Any]] = SGDTrainingArguments.NOT_READ | {"label_smoothing_factor": 0, "eval_delay": 0}

    num_train_epochs: float = field(default=200, metadata={"help": "Passes over the images."})
    learning_rate: float = field(default=0.03, metadata={"help": "Learning rate; 0.03 is for a global batch of 256."})
    weight_decay: float = field(
        default=1e-4, metadata={"help": "Weight decay, of BatchNorm and biases too (not with lars)."}
    )
    eval_strategy: Literal["no", "epoch"] = field(
        default="epoch", metadata={"help": "When to run the monitor: no or epoch."}
    )
    eval_every_n_epochs: int = field(default=1, metadata={"help": "Epochs between two runs of the monitor."})
    knn_k: list[int] = field(
        default_factory=lambda: [200],
        metadata={"help": "Neighbours that vote in the kNN of the monitor; several are compared."},
    )
    knn_temperature: float = field(
        default=0.07, metadata={"help": "Temperature T of the votes: exp(cosine similarity / T)."}
    )
    knn_bank_size: int | None = field(
        default=None,
        metadata={"help": "Number of evenly spaced train images that the monitor looks at; by default all."},
    )
    knn_features: Feature = field(default="backbone", metadata={"help": "Features of the monitor: backbone or head."})
    include_pictures: bool = field(
        default=False, metadata={"help": f"With push_to_hub, and trackers that are elsewhere: {INCLUDE_PICTURES}"}
    )
    queue_start: Literal["random", "encode"] | None = field(
        default=None,
        metadata={
            "help": "Keys in the queue before the first step: random ones, or those of training images that the key encoder "
            "encodes. By default encode with init_from, unless a queue comes along, and random without."
        },
    )
    bank_start: Literal["random", "encode"] | None = field(
        default=None,
        metadata={
            "help": "Keys in a bank before the first step: random ones, as in the original code, or those that the encoder "
            "makes of one view of every image, with which short runs learn earlier. By default encode with init_from, and "
            "random without."
        },
    )
    cuda_graph: bool = field(
        default=False,
        metadata={
            "help": "On one GPU of NVIDIA: record a step as a CUDA graph and replay it. The numbers are the same; it is faster "
            "where the host starts kernels more slowly than the GPU runs them (small networks, images or batches)."
        },
    )
    key_momentum_schedule: Literal["constant", "cosine"] = field(
        default="constant",
        metadata={"help": "Momentum of the key encoder: constant, or from key_momentum to 1 by a half cosine (v3)."},
    )
    dataloader_drop_last: bool = field(default=True)  # the queue needs whole batches
    ddp_broadcast_buffers: bool | None = field(default=False)  # ranks keep their BatchNorm statistics, queues are equal

    def __post_init__(self):
        super().__post_init__()
        if not self.dataloader_drop_last:
            raise ValueError("dataloader_drop_last (False) must stay on: the queue needs whole batches")
        if self.eval_every_n_epochs < 1:
            raise ValueError(f"eval_every_n_epochs ({self.eval_every_n_epochs}) must be at least 1")
        if self.knn_bank_size is not None and self.knn_bank_size < 1:
            raise ValueError(
                f"knn_bank_size ({self.knn_bank_size}) must be at least 1 image; leave it out for all of them"
            )
        _ = self.knn  # checks its values

    def key_momentum(self, base: float, progress: float) -> float:
        """The momentum m of the key encoder where so much of the run is done, from 0 to 1 (v3, main_moco.py)."""
        if self.key_momentum_schedule == "constant":
            return base
        return 1 - 0.5 * (1 + math.cos(math.pi * progress)) * (1 - base)

    @property
    def trackers(self) -> Trackers:
        return replace(super().trackers, include_pictures=self.include_pictures)

    @property
    def knn(self) -> KNNArguments:
        """The monitor's settings."""
        names = (
            "knn_k",
            "knn_temperature",
            "knn_features",
            "per_device_eval_batch_size",
            "dataloader_num_workers",
            "seed",
        )
        return KNNArguments(**{name: getattr(self, name) for name in names})


class MoCoCallback(TrainerCallback):
    """What happens around the steps: the momentum update, when to log and evaluate."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        # Before the first micro-batch of every optimizer step, with the weights that the last one left: official order.
        model.update_key_encoder(args.key_momentum(model.config.key_momentum, state.global_step / state.max_steps))
        # The same on all processes, whatever their seeds, and after a resume: the order of keys, the keys from a bank.
        model.shuffle_generator = seeded_generator(state.global_step)
        model.dictionary.generator = seeded_generator(state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:
            control.should_log = True  # a run shorter than logging_steps has a loss too

    def on_epoch_end(self, args, state, control, **kwargs):
        if args.eval_strategy == IntervalStrategy.EPOCH:
            last = state.global_step >= state.max_steps
            control.should_evaluate = last or round(state.epoch) % args.eval_every_n_epochs == 0


class OnDevice(DataLoader):
    """Moves batches to the device without waiting for the copy, as accelerate's loaders do; a stream has none of these."""

    def __iter__(self):
        device = PartialState().device
        for batch in super().__iter__():
            yield {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


class MoCoTrainer(SGDTrainer):
    """Pretrains a [`MoCoModel`].

    Args:
        model: in float32 (mixed precision comes from `args.bf16`).
        args: see [`MoCoTrainingArguments`].
        train_dataset: images with the `Views` transform, or images alone as `as_training_images` takes them, in the size of
            the image processor.
        processing_class: the image processor, saved beside every checkpoint.
        knn_bank: images with the `EvaluationView` transform, whose features the monitor looks at.
        render: makes the views of a batch on the device (`DeviceViews`), where `train_dataset` gives no finished views.
        knn_queries: the same of another split; with labels in both the monitor is kNN.
        view: makes a view of an image from `train_dataset` and a generator, as `OwnViews` takes it; by default that of v2.
        callbacks: called after the project's own.

    Raises:
        ValueError: the model has no dictionary, the image processor is for others, the queue is smaller than a batch, the
            images are fewer than a batch, or the weights are in 16 bits.
    """

    control: TrainerControl

    def __init__(
        self,
        model: MoCoModel,
        args: MoCoTrainingArguments,
        train_dataset: TrainingImages | datasets.Dataset | Dataset,
        processing_class,
        knn_bank: MapImages | None = None,
        knn_queries: MapImages | None = None,
        render: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] | None = None,
        view: OwnView | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ):
        _check_model(model, processing_class)
        bank = isinstance(model.dictionary, BankDictionary)
        images = as_training_images(train_dataset, processing_class, args.seed, view, bank)
        _check_sizes(model, args, images)
        self.unreadable = ListUnreadable(images, knn_queries)
        super().__init__(
            model=model,
            args=args,
            train_dataset=images,
            eval_dataset=knn_queries or knn_bank or images,  # Trainer wants one, or it would not evaluate
            processing_class=processing_class,
            data_collator=collate,
            # Before those that complete a checkpoint.
            callbacks=[MoCoCallback(), RankStatistics(), self.unreadable, *(callbacks or [])],
        )
        self.render = render
        self.monitor = Monitor(self.model, args.knn, knn_bank, knn_queries)
        # Since the last log, per micro-batch: these are of equal size, so the mean over them is the mean over all queries.
        self._statistics: list[torch.Tensor] = []
        self._step: Step | None = None
        self._images = 0
        self._logged_at = time.perf_counter()
        self._waited = 0.0  # seconds for images, since the last log
        self._told_of_slow_process = False

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        if not resume_from_checkpoint:
            self._fill_dictionary()
        if world_size() > 1:  # ranks may have drawn different keys; from here on they stay equal
            for buffer in self.model.dictionary.buffers():
                dist.broadcast(buffer, src=0)
        if self.args.cuda_graph and (reason := self._why_no_graph()):
            logger.info("cuda_graph is without effect: %s", reason)
        self._step = None  # a graph belongs to the tensors that it was recorded with
        self._logged_at = time.perf_counter()
        with warnings.catch_warnings():
            # torch 2.14 itself says to keep it where each rank has buffers of its own when training begins.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            result = super().train(resume_from_checkpoint, *args, **kwargs)
        if self._lacks_last_evaluation():
            self.evaluate()
        return result

    def _lacks_last_evaluation(self) -> bool:
        """Whether the run was killed between its last checkpoint and the evaluation of the same step, and has come back."""
        args, step = self.args, self.state.global_step
        if args.eval_strategy != IntervalStrategy.EPOCH or args.load_best_model_at_end or self.stopped_by is not None:
            return False
        names = {name for entry in self.state.log_history if entry["step"] == step for name in entry}
        return self.began_at == step and not any(name.startswith("eval_") for name in names)

    @torch.no_grad()
    def _fill_dictionary(self) -> None:
        """Give it the keys that `queue_start` or `bank_start` asks for. They are the same again if the run is begun again."""
        dictionary, args = self.model.dictionary, self.args
        if isinstance(dictionary, BankDictionary):
            if args.bank_start == "encode":
                self._fill_bank(dictionary)
        elif args.queue_start == "random":
            dictionary.reset()
        elif args.queue_start == "encode":
            self._fill_queue(dictionary)

    def _fill_bank(self, bank: BankDictionary) -> None:
        images: Any = self.train_dataset
        if not isinstance(
            images, StreamedImages
        ):  # a stream leaves out less than a global batch: these keys stay random
            batch = self.args.world_size * self.args.per_device_train_batch_size
            images = Subset(images, [i % len(images) for i in range(-(-len(images) // batch) * batch)])
        self.train_dataset.set_epoch(math.ceil(self.args.num_train_epochs))
        loader = (
            self._loader(images, OnDevice)
            if isinstance(images, StreamedImages)
            else self.accelerator.prepare(self._loader(images))
        )
        self.model.train()  # queries are normalised by their batch, as in training
        for batch in tqdm(loader, "encoding the bank", disable=rank() > 0 or None):
            views = self.make_views(batch)
            with self.compute_loss_context_manager():
                q = self.model.encode_queries(views["pixel_values"])
            bank.store(gather(q), gather(views["index"]), momentum=0)

    def _fill_queue(self, dictionary: Dictionary) -> None:
        args, epoch = self.args, math.ceil(self.args.num_train_epochs)
        needed = math.ceil(self.model.config.queue_size / (args.world_size * args.per_device_train_batch_size))
        # Epochs without end: the queue may hold more images than there are.
        epochs = chain.from_iterable(map(self._batches_of, count(epoch)))
        batches = tqdm(islice(epochs, needed), "encoding the queue", needed, disable=rank() > 0 or None)
        self.model.train()  # keys are normalised by their batch, as in training
        for number, batch in enumerate(batches):
            self.model.shuffle_generator = seeded_generator(self.args.seed, epoch, number)
            views = self.make_views(batch)
            with self.compute_loss_context_manager():
                keys = self.model.encode_keys(views[VIEWS[1]])
            dictionary.enqueue(keys)

    def _batches_of(self, epoch: int) -> Iterator[dict[str, torch.Tensor]]:
        """The batches of this process in an epoch that the run itself does not reach."""
        loader: Any = self.get_train_dataloader()
        self.train_dataset.set_epoch(epoch)
        if not isinstance(self.train_dataset, StreamedImages):  # which orders itself
            loader.set_epoch(epoch)  # accelerate's
        yield from loader

    def build_train_dataloader(self) -> DataLoader:
        if isinstance(self.train_dataset, MemoryImages):  # a batch is a few numbers: a worker would be slower
            alone: dict[str, Any] = {"num_workers": 0, "prefetch_factor": None, "persistent_workers": False}
            return self.accelerator.prepare(self._loader(self.train_dataset, shuffle=True, **alone))
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
        return self._loader(self.train_dataset, OnDevice, drop_last=True)

    def get_batch_samples(self, *args, **kwargs):
        started = time.perf_counter()
        batches = super().get_batch_samples(*args, **kwargs)
        self._waited += time.perf_counter() - started
        return batches

    def make_views(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The two views of a batch that is on the device, in float32 or uint8 whatever the precision of training."""
        if self.render is None:
            return batch
        if isinstance(self.train_dataset, MemoryImages):
            batch = self.train_dataset.with_pixels(batch)
        with torch.autocast(self.args.device.type, enabled=False):
            return self.render(batch)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = self.make_views(inputs)
        outputs = model(**inputs)
        self._keys = outputs.key_embeds, outputs.key_index
        q = outputs.query_embeds[: len(inputs["pixel_values"])]
        self._found = contrast_statistics(outputs.logits, q, self.model.config.temperature)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def forward_and_backward(self, model, inputs, num_items_in_batch=None):
        if self._step is None:
            self._step = partial(self._contrast, model)
            if self.args.cuda_graph and self._why_no_graph() is None:
                self._step = StepGraph(self.model, self._step)
        loss, statistics = self._step(self._prepare_inputs(inputs))
        self._statistics.append(statistics)
        self._images += len(next(iter(inputs.values())))
        return loss

    def _contrast(self, model, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        loss = super().forward_and_backward(model, batch)
        self.model.dictionary.enqueue(*self._keys)  # after backward, which needs the queue as the forward saw it
        return loss, self._found

    def _why_no_graph(self) -> str | None:
        """What forbids to replay the step as a graph; None if nothing does."""
        args, dictionary = self.args, self.model.dictionary
        forbidden = {
            f"it is for a GPU of NVIDIA, and this is {args.device.type}": args.device.type != "cuda",
            "several processes share a step": args.world_size > 1,
            "a step has several batches (gradient_accumulation_steps)": args.gradient_accumulation_steps > 1,
            "fp16 scales the loss by what it reads from the GPU": args.fp16,
            "torch_compile makes graphs of its own": args.torch_compile,
            "the dictionary draws its keys on the host": not isinstance(dictionary, QueueDictionary | BatchDictionary),
            "DeepSpeed or FSDP makes the step": self.is_deepspeed_enabled or self.is_fsdp_enabled,
        }
        return next((reason for reason, holds in forbidden.items() if holds), None)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        """What the monitor sees, each name with the prefix "eval_".

        Returns:
            knn_top1 for the first k (per cent), knn_top1_k20 and the like for others; rankme; and once training has begun
            contrast_top1, contrast_top1_shuffled and leaks (0 or 1), see `health.leak`. Without labels there is no kNN, for
            a stream no RankMe either.

        Raises:
            ValueError: for an `eval_dataset`.
        """
        if eval_dataset is not None:
            raise ValueError("eval_dataset is not looked at: give the trainer knn_bank and knn_queries")
        started = time.perf_counter()
        self._check_finite(weights=True)
        metrics = self.monitor.look_at_features()
        if views := self._views_for_leak():
            metrics |= self.monitor.look_for_leak(views)
        self.monitor.report(metrics, self.state.global_step)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._logged_at += time.perf_counter() - started  # images per second are those of training
        return metrics

    def predict(self, *args, **kwargs):
        """
        Raises:
            ValueError: always. There are no labels to predict.
        """
        raise ValueError(
            "a model that contrasts images predicts no labels: train a MoCoForImageClassification on its encoder, or take "
            "MoCoModel's pooler_output as features"
        )

    def _views_for_leak(self) -> Views:
        # At most LEAK_IMAGES in batches as in training, in views that are not in the queue yet; none before training.
        batch, ranks = self.args.per_device_train_batch_size, self.args.world_size
        batches = min(max(4, LEAK_IMAGES // (batch * ranks)), self.train_dataset.images_per_epoch // (batch * ranks))
        # Where no keys are encoded, none is normalised with the batch of its query, or all are.
        if self.state.global_step == 0 or batches < 2 or self.model.config.key_encoder == "none":
            return []
        epoch = int(self.state.epoch or 0) + 1
        images = collate(self.train_dataset.sample(batches * batch, epoch, self.args.process_index, ranks))
        parts = zip(*(tensor.split(batch) for tensor in images.values()), strict=True)
        moved = (
            {name: tensor.to(self.args.device) for name, tensor in zip(images, part, strict=True)} for part in parts
        )
        return [(views[VIEWS[0]], views[VIEWS[1]]) for views in map(self.make_views, moved)]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            metrics = self._training_metrics()
            self.monitor.report(metrics, self.state.global_step)
            logs |= metrics
        super().log(logs, start_time)

    def _training_metrics(self) -> dict[str, float]:
        # In float64 on the CPU: Apple's GPUs have none.
        means = gather(torch.stack(self._statistics)).cpu().double().mean(dim=0).tolist()
        images = self._images * world_size()
        self._statistics, self._images = [], 0
        seconds, self._logged_at = time.perf_counter() - self._logged_at, time.perf_counter()
        waited = gather(torch.tensor([self._waited], device=self.args.device)).tolist()
        self._waited = 0.0
        if not self._told_of_slow_process and (problem := slow_process(waited, seconds)) and rank() == 0:
            self._told_of_slow_process = True
            logger.warning(problem)
        metrics = dict(zip(STATISTICS, means, strict=True))
        config, steps = self.model.config, self.state.global_step
        if config.dictionary == "queue":
            keys_per_step = self.args.global_batch_size * (2 if config.symmetric_loss else 1)
            metrics["queue_age"] = queue_age(config.queue_size, keys_per_step, steps)
        elif isinstance(self.model.dictionary, BatchDictionary):
            metrics["negatives"] = self.model.dictionary.negatives(config, self.args.global_batch_size)
        if self.model.has_key_encoder:
            metrics["key_drift"] = key_drift(self.model)
        return metrics | {
            "uniformity": math.log(metrics["uniformity"]) if metrics["uniformity"] > 0 else math.nan,
            # |q - k|² of unit vectors: Wang and Isola, equation 3
            "alignment": 2 - 2 * metrics["positive_similarity"],
            "images_per_second": images / seconds,
            "waiting_for_data": 100 * max(waited) / seconds,  # one that waits for images keeps all others waiting
        }


@torch.no_grad()
def contrast_statistics(logits: torch.Tensor, q: torch.Tensor, temperature: float) -> torch.Tensor:
    """`STATISTICS` of logits (N, 1+K) and queries (N, C), before the logarithm of the uniformity: (5,)."""
    positive, negatives = logits[:, :1], logits[:, 1:]
    # Negatives that the positive does not beat: ties and NaN count, or a collapsed run would look perfect.
    rank = (~(negatives < positive)).sum(dim=1)
    statistics = {
        "contrast_top1": 100 * (rank < 1).float().mean(),
        "contrast_top5": 100 * (rank < 5).float().mean(),
        "positive_similarity": temperature * positive.mean(),
        "hardest_negative_similarity": temperature * negatives.amax(dim=1).mean(),
        "uniformity": uniformity_kernel(q),
    }
    assert tuple(statistics) == STATISTICS
    return torch.stack(list(statistics.values()))


def _check_model(model: MoCoModel, processor: Any) -> None:
    if not getattr(model, "momentum_encoder", False):
        raise ValueError(
            f"model ({type(model).__name__}) has no dictionary of keys: build MoCoModel(config), or load it with "
            "MoCoModel.from_pretrained and without momentum_encoder=False"
        )
    if processor is None:  # the images come as views of somebody's own, and nothing is saved with the model
        return
    for name in ("image_mean", "image_std"):  # which the model has for views, and the processor for all later images
        of_model, given = list(getattr(model.config, name)), getattr(processor, name, None)
        of_processor = [given] * 3 if isinstance(given, float | int) else given
        if of_processor is None or list(of_processor) != of_model:
            raise ValueError(
                f"processing_class has {name} {given}, and the model {of_model}: pass a MoCoImageProcessor with the numbers "
                f"of MoCoConfig({name}=...)"
            )


def _check_sizes(model: MoCoModel, args: MoCoTrainingArguments, images: TrainingImages) -> None:
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
    if args.queue_start is not None and isinstance(model.dictionary, BatchDictionary | BankDictionary):
        raise ValueError(
            f"queue_start ({args.queue_start}) is for a queue, not for a {model.config.dictionary}: leave it out"
        )
    if args.bank_start is not None and not isinstance(model.dictionary, BankDictionary):
        raise ValueError(
            f"bank_start ({args.bank_start}) is for a bank, not for a {model.config.dictionary}: leave it out"
        )
    if args.key_momentum_schedule != "constant" and not model.has_key_encoder:
        raise ValueError(
            f"key_momentum_schedule ({args.key_momentum_schedule}) is for key_encoder='momentum', not for "
            f"{model.config.key_encoder!r}: leave it out"
        )
    if isinstance(model.dictionary, BatchDictionary):
        if args.gradient_accumulation_steps > 1:
            raise ValueError(
                f"gradient_accumulation_steps ({args.gradient_accumulation_steps}) must be 1 for dictionary="
                f"{model.config.dictionary!r}: negatives are those of the images that are encoded together, which it does not "
                "make more. Use a larger batch, more processes, or dictionary='queue'"
            )
        if micro_batch < 2:
            raise ValueError("global_batch_size (1) leaves no negatives in the batch: raise it")
    elif isinstance(model.dictionary, BankDictionary):
        if model.config.bank_size != images.images_per_epoch:
            raise ValueError(
                f"bank_size ({model.config.bank_size}) is not the number of images ({images.images_per_epoch}): the bank has a "
                "key for each. Continue with the dataset that the run began with, or build the model with this bank_size"
            )
    elif model.config.queue_size < keys:
        raise ValueError(
            f"queue_size ({model.config.queue_size}) is smaller than the keys of a global batch ({keys}): raise it or lower "
            "the batch"
        )
    if len(images) == 0 or (not isinstance(images, StreamedImages) and len(images) < micro_batch):
        raise ValueError(
            f"the dataset ({images.images_per_epoch} images) is smaller than the global batch ({micro_batch}): lower the "
            "batch or use more images"
        )
