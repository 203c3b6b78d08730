"""One module for each command: it parses its flags, builds and runs.

A checkout starts them as `python scripts/NAME.py`, an installation as `moco NAME`, and both under `accelerate launch` where a
run has several processes.
"""

import signal
import sys
from importlib import import_module

# Name for `moco`: the module, whose last word is the script's name too, and what it does.
COMMANDS = {
    "pretrain": ("pretrain", "pretrain an encoder without labels"),
    "knn": ("evaluations.knn", "classify by nearest neighbours on frozen features"),
    "probe": ("evaluations.linear_probe", "train a linear classifier on a frozen encoder"),
    "finetune": ("evaluations.finetune", "train a whole encoder with few labels or all"),
    "detect": ("evaluations.detect", "train a detector around an encoder and measure it"),
    "segment": ("evaluations.segment", "train a segmentation model around an encoder and measure it"),
    "prepare": ("prepare", "write a dataset as smaller images, from which training reads many times as fast"),
    "embed": ("embed", "embed a dataset, search it and find near-duplicates"),
    "report": ("report", "draw the figures of a run and write its report.html"),
    "compare": ("compare", "compare runs in a table and a figure"),
    "table": ("tables.table", "run a table of a paper and show ours beside theirs"),
    "convert": ("models.convert", "convert a checkpoint of other MoCo code, or back"),
    "export": ("models.export", "write a model in formats of other libraries"),
    "publish": ("models.push_to_hub", "publish a run or a model on the Hub"),
    "benchmark": ("benchmark", "measure speed and memory"),
}


def main() -> None:
    """The console command `moco`: `moco NAME FLAGS`, `moco NAME --help`."""
    name, *argv = sys.argv[1:] or ["--help"]
    if name in COMMANDS:
        run(name, argv)
        return
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {does}" for name, (_, does) in COMMANDS.items()]
    usage = "\n".join(
        ["usage: moco COMMAND [--flag value ...]", "", *lines, "", "moco COMMAND --help lists its flags."]
    )
    if name in ("-h", "--help"):
        print(usage)
        return
    print(f"error: command {name!r} is unknown: choose one of {', '.join(COMMANDS)}", file=sys.stderr)
    raise SystemExit(2)


def run(name: str, argv: list[str]) -> None:
    """Run the command that `moco` calls `name`."""
    # Some of them take seconds to import. Nothing has begun until then, so Ctrl-C may end the process as it is.
    handler = signal.getsignal(signal.SIGINT)
    if handler is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    module = import_module(f".{COMMANDS[name][0]}", __name__)
    signal.signal(signal.SIGINT, handler)
    module.main(argv)
