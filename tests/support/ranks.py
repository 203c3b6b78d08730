"""Processes of one test that train, evaluate or count together."""

import multiprocessing
import os
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# A process that has imported these is forked for every rank: alone, each would spend most of its time on importing them.
multiprocessing.set_forkserver_preload(
    ["torch", "torchvision", "timm", "transformers.trainer", "accelerate", "datasets"]
)


def run_ranks(function: Callable, args: tuple, count: int) -> None:
    """`function(rank, *args)` in a process for each rank; the first error of one is raised.

    What they get from this process is what is pickled: neither its models nor its threads, as they would by a mere fork.
    """
    mp.start_processes(function, args, count, start_method="forkserver")


def join_trainers(rank: int, folder: str, count: int) -> None:
    """Make this process one of `count` that Trainer takes for those of a launcher.

    They meet at a file: a port that is free now may be another program's before they have started.
    """
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "ACCELERATE_USE_CPU": "true"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}  # accelerate wants the one and obeys the other
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=count)
