"""What both benchmarks share: interleaved timing, peak memory, a table."""

import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch


def paired(variants: dict[str, Callable], runs: int) -> dict[str, list[float]]:
    """Seconds of each variant, one round after the other (so that a busy moment meets all of them), after one round unmeasured."""
    seconds = {name: [] for name in variants}
    for round_ in range(runs + 1):
        for name, variant in variants.items():
            began = time.perf_counter()
            variant()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if round_:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def peak_memory(variant: Callable) -> float:
    """GB that a call needs beyond what is held before it: the device's allocator on CUDA, the resident set on Linux."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        variant()
        return (torch.cuda.max_memory_allocated() - before) / 1e9
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not clear.exists():
        return float("nan")
    read = lambda key: int(next(x for x in status.read_text().splitlines() if x.startswith(key)).split()[1])  # noqa: E731
    clear.write_text("5")  # resets the peak
    before = read("VmRSS")
    variant()
    return (read("VmHWM") - before) / 1e6


def report(
    title: str, variants: dict[str, Callable], bare: str, runs: int, memory: bool = True, per: int = 1, unit: str = ""
) -> dict[str, float]:
    """Time the variants and print medians, the median of the paired ratios to `bare`, and peak memory -> the ratios."""
    seconds = paired(variants, runs)
    print(f"\n{title} (median of {runs} paired runs)")
    print(f"| variant | seconds | x {bare} |{f' {unit} a second |' if unit else ''}{' peak GB |' if memory else ''}")
    print("|---|---|---|" + ("---|" if unit else "") + ("---|" if memory else ""))
    ratios = {}
    for name, variant in variants.items():
        ratios[name] = statistics.median(a / b for a, b in zip(seconds[name], seconds[bare], strict=True))
        median = statistics.median(seconds[name])
        line = f"| {name} | {median:.3f} | {ratios[name]:.2f} |" + (f" {per / median:,.0f} |" if unit else "")
        print(line + (f" {peak_memory(variant):.2f} |" if memory else ""), flush=True)
    return ratios


def machine() -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.processor() or platform.machine()} CPU"
    return f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}"
