"""What benchmarks share: variants timed in turns, peak memory, and one form for what came out.

A benchmark is a module with `add_arguments(parser)` and `run(args) -> list[Benchmark]`, named in `scripts/benchmark.py`, which
prints the tables and writes `--json` and `--picture`:

```python
seconds = time_rounds({"ours": our_call, "other": other_call}, rounds=5)
return [Benchmark("two views of 32 images", seconds, images=32, references=("other",))]
```

The first of `references` is the limit where there is one: a variant that does only what cannot be avoided. All variants are
timed in the same run and in turns, because a machine is not equally fast all day. Memory is measured apart from time.
"""

import json
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ..results import conditions


@dataclass(frozen=True)
class Benchmark:
    """Variants of the same work and how long each took.

    Args:
        title: the work in a few words, with the settings that decide about its time.
        seconds: of every variant, one for each round.
        references: variants that all are compared with.
        images: of one round of one variant; 0 where the work is not counted in images.
        columns: other figures, by what the table calls them and by variant.
        remarks: lines below the table.
        paired: whether the n-th seconds of all variants are of the same round, so that rounds can be won.
    """

    title: str
    seconds: dict[str, list[float]]
    references: tuple[str, ...] = ()
    images: int = 0
    columns: dict[str, dict[str, float]] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    paired: bool = True

    def median(self, variant: str) -> float:
        """Seconds."""
        return median(self.seconds[variant])

    def ratio(self, variant: str, reference: str) -> float:
        """How many times as long as the reference the variant takes (medians)."""
        return self.median(variant) / self.median(reference)

    def faster(self, variant: str, reference: str) -> int:
        """In how many rounds the variant was faster."""
        assert self.paired
        return sum(a < b for a, b in zip(self.seconds[variant], self.seconds[reference], strict=True))

    def figures(self, variant: str) -> dict[str, Any]:
        """All that is known of a variant, for JSON."""
        seconds = self.seconds[variant]
        found: dict[str, Any] = {
            "seconds": seconds,
            "min": min(seconds),
            "median": median(seconds),
            "max": max(seconds),
        }
        if self.images:
            found["images_per_second"] = self.images / median(seconds)
        found["times_as_long_as"] = {reference: self.ratio(variant, reference) for reference in self.references}
        paired = [reference for reference in self.references if self.paired and reference != variant]
        found["rounds_faster_than"] = {reference: self.faster(variant, reference) for reference in paired}
        return found | {name: values[variant] for name, values in self.columns.items() if variant in values}

    def table(self) -> str:
        """Title, a line for each variant, and the remarks."""
        header = ["", "min", "median", "max ms"] + ["images/s"] * bool(self.images)
        header += [f"x {reference}" + " (faster)" * self.paired for reference in self.references]
        rows = [header + list(self.columns)]
        for variant in self.seconds:
            found = self.figures(variant)
            row = [variant, *(_digits(1000 * found[key]) for key in ("min", "median", "max"))]
            row += [_digits(found["images_per_second"])] if self.images else []
            for reference, ratio in found["times_as_long_as"].items():
                wins = found["rounds_faster_than"].get(reference)
                row.append(f"{ratio:.3f}" + (f" ({wins} of {len(found['seconds'])})" if wins is not None else ""))
            rows.append(row + [_digits(found[name]) if name in found else "" for name in self.columns])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
        return "\n".join([self.title, *lines, *self.remarks])


def _digits(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def write_json(benchmarks: list[Benchmark], path: Path) -> None:
    """Every figure, with versions, hardware, threads, command and commit."""
    measured = [
        {
            "title": benchmark.title,
            "references": benchmark.references,
            "variants": {variant: benchmark.figures(variant) for variant in benchmark.seconds},
            "remarks": benchmark.remarks,
        }
        for benchmark in benchmarks
    ]
    content = conditions() | {"threads": torch.get_num_threads(), "benchmarks": measured}
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def time_rounds(variants: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call in each round, after two that are not counted: torch.compile may compile twice.

    Every round calls all variants, and begins with another one than the round before: the caches are not always the same
    one's.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    for name in names * 2:
        variants[name]()
    for i in range(rounds):
        first = i % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(elapsed(variants[name]))
    return seconds


def elapsed(call: Callable[[], Any]) -> float:
    """Seconds of one call, the GPU's work included."""
    _finish_gpu_work()
    start = time.perf_counter()
    call()
    _finish_gpu_work()
    return time.perf_counter() - start


def _finish_gpu_work() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class PeakMemory:
    """`with PeakMemory() as memory: ...`, then `memory.bytes`: resident memory at its highest, above what it was before.

    Of this process, and of Linux. What was freed before may be used again unseen: measure in a process of its own.
    """

    bytes: int

    def __enter__(self) -> "PeakMemory":
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        self._before = _status("VmRSS")
        return self

    def __exit__(self, *exception: object) -> None:
        self.bytes = max(0, _status("VmHWM") - self._before)


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return 1024 * int(line.split()[1])


def in_own_process(call: Callable[..., Any], *args: Any) -> Any:
    """The result of a call in a new process, whose memory and threads are its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(call, *args).result()
