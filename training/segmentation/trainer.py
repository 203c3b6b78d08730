"""SegmentationTrainer: a segmentation model trained as MoCo v1 trains it, in steps."""

from dataclasses import dataclass, field

from modeling_moco import MoCoForSemanticSegmentation, MoCoSegmentationImageProcessor

from ..transfer.step_trainer import StepTrainer, StepTrainingArguments
from .dataset.views import SegmentationCollator, SegmentationImages


@dataclass
class SegmentationTrainingArguments(StepTrainingArguments):
    """The training of the paper on VOC: 30,000 steps of 16 images (arXiv:1911.05722, appendix A.5)."""

    TRAINED = "segmentation models"

    max_steps: int = field(default=30_000, metadata={"help": "Optimizer steps."})
    learning_rate: float = field(default=0.003, metadata={"help": "Learning rate; 0.003 is for a global batch of 16."})
    step_milestones: list[int] = field(
        default_factory=lambda: [21_000, 27_000],
        metadata={"help": "Steps at which the learning rate drops to a tenth; without a value none."},
    )


class SegmentationTrainer(StepTrainer):
    """Trains a [`MoCoForSemanticSegmentation`]. The loss is the mean over the pixels of a process that count.

    Args:
        train_dataset: views of images with their masks.
        processing_class: the image processor, saved beside every checkpoint.
    """

    args: SegmentationTrainingArguments
    train_dataset: SegmentationImages

    def __init__(
        self,
        model: MoCoForSemanticSegmentation,
        args: SegmentationTrainingArguments,
        train_dataset: SegmentationImages,
        processing_class: MoCoSegmentationImageProcessor,
    ):
        crop = train_dataset.view.crop
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            images="images with masks",
            processing_class=processing_class,
            data_collator=SegmentationCollator(processing_class.image_mean, processing_class.image_std, crop),
        )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss
