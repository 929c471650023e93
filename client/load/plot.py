"""Pictures of what was measured. Needs matplotlib, which comes with `pip install 'mnist-grpc[bench]'`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from client.load.report import has

PERCENTILES = ("p50", "p90", "p99", "p99.9", "p99.99", "max")


def check_plot(path: str | os.PathLike[str]) -> None:
    """Raise ValueError if no picture can be drawn, or not to such a file, before what takes long."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("--plot needs matplotlib: pip install 'mnist-grpc[bench]'") from error
    formats = Figure().canvas.get_supported_filetypes()
    suffix = os.path.splitext(os.fspath(path))[1].lstrip(".").lower()
    if suffix not in formats:
        raise ValueError(f"--plot takes a file that ends with .png, .svg or .pdf, not {os.fspath(path)!r}")
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        raise ValueError(f"--plot: there is no folder {folder!r}")
    if os.path.isdir(path) or not os.access(path if os.path.exists(path) else folder, os.W_OK):
        raise ValueError(f"--plot: {os.fspath(path)!r} cannot be written")


def draw(path: str | os.PathLike[str], title: str, runs: Sequence[dict[str, Any]]) -> None:
    """Latencies by percentile, and what was answered, by callers or by images, of all runs.

    Raises:
        OSError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.8), layout="constrained")
    latency, throughput = figure.subplots(1, 2)
    figure.suptitle(title)
    for run in runs:
        found = run["latency_us"]
        shown = {place: found[name] / 1e3 for place, name in enumerate(PERCENTILES) if has(found, name)}
        latency.plot(list(shown), list(shown.values()), marker="o", label=run["name"])
    latency.set_xticks(range(len(PERCENTILES)), PERCENTILES)
    latency.set(yscale="log", ylabel="latency, ms", xlabel="percentile of messages", title="latency")
    axis = _axis(runs)
    for name, of in _series(runs, axis).items():
        places = [run[axis] for run in of]
        (line,) = throughput.plot(places, [run["images_per_second"] for run in of], marker="o", label=name)
        ceilings = [run["ceiling"]["images_per_second"] for run in of if run.get("ceiling")]
        if len(ceilings) == len(of):
            throughput.plot(
                places, ceilings, linestyle=":", color=line.get_color(), label=f"{name}: generator's ceiling"
            )
    labels = {"images": "images in a message", "rate": "messages a second, sent", "callers": "callers"}
    throughput.set(xlabel=labels[axis], ylabel="images a second", title="throughput", xscale="log", yscale="log")
    for axes in (latency, throughput):
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize="x-small")
    figure.savefig(path, dpi=110)


def _axis(runs: Sequence[dict[str, Any]]) -> str:
    """What the runs differ in, by which most of them stand side by side."""
    if any(run["rate"] is not None for run in runs):
        return "rate"
    return max(("callers", "images"), key=lambda name: len({run[name] for run in runs}))


def _series(runs: Sequence[dict[str, Any]], axis: str) -> dict[str, list[dict[str, Any]]]:
    """The runs that make a line, by its name, in the order of the axis."""
    others = {"callers": "images", "images": "callers", "rate": "images"}
    series: dict[str, list[dict[str, Any]]] = {}
    for run in sorted(runs, key=lambda run: float(run[axis])):
        what = others[axis]
        things = what.removesuffix("s") if run[what] == 1 else what
        series.setdefault(f"{run['kind']}, {run[what]:,} {things}", []).append(run)
    return series
