"""Tools of the benchmarks: time variants in turns, measure peak memory, and report results in one form.

A benchmark is a module with `add_arguments(parser)` and `run(args) -> list[Benchmark]`, named in `scripts/benchmark.py`, which
prints the tables and writes `--json` and `--figure`:

```python
seconds = time_rounds({"ours": our_call, "other": other_call}, rounds=5)
return [Benchmark("two views of 32 images", seconds, images=32, references=("other",))]
```

If there is a limit, it is the first of `references`: a variant that does only the unavoidable work. All variants are timed in
the same run and in turns, because the speed of a machine varies over a day. Memory is measured separately from time.
"""

import gc
import textwrap
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes

from ..engine.files import write_json
from ..engine.results import conditions
from ..plots import BLUE, GRAY, INK, figure


@dataclass(frozen=True)
class Benchmark:
    """Variants of the same work, and the time that each took.

    Args:
        title: the work in a few words, with the settings that determine its time.
        seconds: of each variant, one number per round.
        references: variants that all variants are compared with.
        images: number of images in one round of one variant; 0 where the work is not counted in images.
        columns: other numbers, by column name and by variant.
        remarks: lines below the table.
        paired: whether the n-th seconds of all variants belong to the same round, so that rounds can be compared.
    """

    title: str
    seconds: dict[str, list[float]]
    references: tuple[str, ...] = ()
    images: int = 0
    columns: dict[str, dict[str, float]] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    paired: bool = True

    def median(self, variant: str) -> float:
        """Median seconds of a variant."""
        return median(self.seconds[variant])

    def ratio(self, variant: str, reference: str) -> float:
        """Median time of the variant divided by that of the reference."""
        return self.median(variant) / self.median(reference)

    def faster(self, variant: str, reference: str) -> int:
        """Number of rounds in which the variant was faster than the reference."""
        assert self.paired
        return sum(a < b for a, b in zip(self.seconds[variant], self.seconds[reference], strict=True))

    def numbers(self, variant: str) -> dict[str, Any]:
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
        """The title, a line for each variant, and the remarks."""
        header = ["", "min", "median", "max ms"] + ["images/s"] * bool(self.images)
        header += [f"x {reference}" + " (faster)" * self.paired for reference in self.references]
        rows = [header + list(self.columns)]
        for variant in self.seconds:
            found = self.numbers(variant)
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


def write_numbers(benchmarks: list[Benchmark], path: Path, **more: Any) -> None:
    """Every number, and what more there is, with versions, hardware, threads, command and commit."""
    measured = [
        {
            "title": benchmark.title,
            "references": benchmark.references,
            "variants": {variant: benchmark.numbers(variant) for variant in benchmark.seconds},
            "remarks": benchmark.remarks,
        }
        for benchmark in benchmarks
    ]
    content = conditions() | {"threads": torch.get_num_threads(), "benchmarks": measured} | more
    write_json(path, content)


def time_rounds(variants: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call in each round, after two calls that are not counted: torch.compile may compile twice.

    Each round calls all variants. It starts with another variant than the round before, so that no variant always finds the
    caches of the same predecessor.
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
    """Seconds of one call, including its work on the GPU."""
    _finish_gpu_work()
    start = time.perf_counter()
    call()
    _finish_gpu_work()
    return time.perf_counter() - start


def _finish_gpu_work() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class PeakMemory:
    """`with PeakMemory() as memory: ...` sets `memory.bytes`: the peak resident memory above that at the start, `before`.

    It measures this process, on Linux. Memory that was freed before the start can be reused unseen: measure in a new process.
    """

    bytes: int
    before: int

    def __enter__(self) -> "PeakMemory":
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        self.before = _status("VmRSS")
        return self

    def __exit__(self, *exception: object) -> None:
        self.bytes = max(0, _status("VmHWM") - self.before)


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return 1024 * int(line.split()[1])


def peak_memory(build: Callable[[], Callable[[], Any]]) -> dict[str, float]:
    """Gigabytes (10^9 bytes) at the peak of two calls of what `build` makes, what it holds included.

    What building alone needs is not counted. On a GPU it is the memory that tensors had and the memory that torch had taken
    for them, in this process; on a CPU it is resident memory above that before building, see [`PeakMemory`].
    """
    if torch.cuda.is_available():
        gc.collect()  # of a model before
        call = build()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        _twice(call)
        return {
            "allocated GB": torch.cuda.max_memory_allocated() / 1e9,
            "reserved GB": torch.cuda.max_memory_reserved() / 1e9,
        }
    with PeakMemory() as building:
        call = build()
    with PeakMemory() as calling:
        _twice(call)
    return {"peak GB": (calling.before + calling.bytes - building.before) / 1e9}


def _twice(call: Callable[[], Any]) -> None:
    for _ in range(2):
        call()  # what the first returns is gone before the second


def in_own_process(call: Callable[..., Any], *args: Any) -> Any:
    """The result of a call in a new process, whose memory and threads are its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(call, *args).result()


def draw_timings(benchmarks: list[Benchmark], path: Path) -> None:
    """Draw a panel for each benchmark: medians as bars, fastest and slowest rounds as error bars, first reference dashed."""
    heights = [0.75 + 0.3 * len(benchmark.seconds) for benchmark in benchmarks]
    with figure(path, sum(heights), layout="constrained") as fig:
        rows = fig.subplots(len(benchmarks), squeeze=False, height_ratios=heights)[:, 0]
        for axis, benchmark in zip(rows, benchmarks, strict=True):
            _draw_timings(axis, benchmark)


def _draw_timings(axis: Axes, benchmark: Benchmark) -> None:
    names, reference = list(benchmark.seconds), benchmark.references[:1]
    milliseconds = [1000 * np.array(benchmark.seconds[name]) for name in names]
    medians = [1000 * benchmark.median(name) for name in names]
    errors = [[m - x.min() for m, x in zip(medians, milliseconds, strict=True)]]
    errors += [[x.max() - m for m, x in zip(medians, milliseconds, strict=True)]]
    colours = [GRAY if name in benchmark.references else BLUE for name in names]
    axis.barh(names, medians, color=colours, height=0.6, xerr=errors, error_kw={"ecolor": INK, "elinewidth": 1})
    for name, middle, values in zip(names, medians, milliseconds, strict=True):
        ratio = "".join(f"  ({benchmark.ratio(name, r):.2f} x {r})" for r in reference if r != name)
        axis.annotate(f"{middle:,.4g}{ratio}", (values.max(), name), (4, 0), textcoords="offset points", va="center")
    for name in reference:
        axis.axvline(1000 * benchmark.median(name), color=INK, linestyle=(0, (4, 2)), linewidth=1)
    axis.invert_yaxis()
    axis.grid(False, axis="y")
    axis.set_xlim(0, 1.45 * max(x.max() for x in milliseconds))
    axis.set_title("\n".join(textwrap.wrap(f"{benchmark.title}, ms", 100)), fontsize=8)
