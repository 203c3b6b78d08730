"""Time and memory of a training step: MoCo's beside its limit and the official style, or beside those of other methods.

Without `--method` (`variants.py`): MoCo's step, and its limits. With `--method` (`methods.py`): MoCo's step beside those of
the methods that the papers compare it with, each by its recipe.

The benchmark uses one process. It first measures the memory of each variant alone, in a process of its own: on a GPU the
allocated memory (of methods the reserved memory too), on a CPU the resident memory above that of the process without a model.
"""

import argparse

from ..measure import Benchmark
from . import methods, variants


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--method",
        nargs="+",
        choices=list(methods.RECIPES),
        help=f"Methods to compare with {methods.BASELINE}, each by its recipe, instead of the variants of one step.",
    )
    parser.add_argument("--architecture", default="resnet50", help="Name of a timm model.")
    parser.add_argument("--global_batch_size", type=int, default=32, help="Number of images per step.")
    parser.add_argument("--image_size", type=int, default=224, help="Side of a view in pixels.")
    parser.add_argument(
        "--queue_size",
        type=int,
        default=65536,
        help="Number of keys in the queue, a multiple of the batch size; of a method, in the queue or drawn from the bank.",
    )
    parser.add_argument(
        "--bank_size",
        type=int,
        default=methods.IMAGENET,
        help="Number of images that a bank keeps a key of; the default is ImageNet's.",
    )
    parser.add_argument(
        "--precision", choices=("fp32", "bf16"), default="fp32", help="Precision of the step; bf16 uses autocast."
    )
    parser.add_argument(
        "--batch_norm", choices=("plain", "split"), default="plain", help="Mode of BatchNorm; split is for one GPU."
    )
    parser.add_argument("--compile", action="store_true", help="Compile the first two variants with torch.compile.")
    parser.add_argument("--rounds", type=int, default=5, help="Number of measured steps of each variant.")


def run(args: argparse.Namespace) -> list[Benchmark]:
    return methods.run(args) if args.method else variants.run(args)
