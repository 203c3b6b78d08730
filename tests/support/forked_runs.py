"""Short lives of process groups inside the wrapper of every command, which end with Python's finalization as a launcher's do.

python tests/support/forked_runs.py RUNS PROCESSES [COMMAND FLAG ...]

The command is imported once and forked for every process of every run; `{run}` in a flag becomes the number of the run. Without
one the processes do a few collectives. Prints a line for every run with the statuses of its processes.
"""

import os
import socket
import sys
from importlib import import_module

import torch
import torch.distributed as dist

from training.commands import COMMANDS
from training.process import command


def start(rank: int, count: int, port: int) -> int:
    """Fork this process into one of `count`, as a launcher sets its environment. Returns 0 in the child."""
    if pid := os.fork():
        return pid
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "ACCELERATE_USE_CPU": "true"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return 0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_all(runs: int, processes: int) -> int | None:
    """Start the runs one after the other. Returns the number of the run in its processes, and None in the parent at the end."""
    for run in range(runs):
        port, pids = free_port(), []
        for rank in range(processes):
            pid = start(rank, processes, port)
            if pid == 0:
                return run
            pids.append(pid)
        print(*(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids), flush=True)
    return None


@command
def collectives(argv: list[str]) -> None:
    dist.init_process_group("gloo")
    for _ in range(20):
        dist.all_reduce(torch.ones(1000))


runs, processes, *words = sys.argv[1:]
main = import_module(f"training.commands.{COMMANDS[words[0]][0]}").main if words else collectives
mine = run_all(int(runs), int(processes))
if mine is not None:
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # the parent's has the statuses
    main([flag.replace("{run}", str(mine)) for flag in words[1:]])
