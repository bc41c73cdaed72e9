"""Times and memory of vision transformers: training steps (E3), resolutions (E4, E5), chunk sizes (E6)."""

import dataclasses
import math
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lion import figures
from lion.benchmarks import (
    RESOLUTIONS,
    UNMEASURED,
    Case,
    by_tokens,
    chunk_cases,
    cost,
    resolution_cases,
    run_cases,
    training_cases,
)
from training.report import Context, Entry, Row

Values = dict[str, Any]
Record = dict[str, Any]

AUTHORS = {
    ("S", "softmax, fused"): 6574,
    ("S", "lion_lit"): 3127,
    ("S", "lion_d"): 2200,
    ("S", "lion_d_two_scans"): 2098,
    ("S", "lion_s"): 1754,
    ("S", "lion_s_two_scans"): 1286,
    ("B", "softmax, fused"): 2749,
    ("B", "lion_lit"): 1437,
    ("B", "lion_d"): 1037,
    ("B", "lion_d_two_scans"): 971,
    ("B", "lion_s"): 832,
    ("B", "lion_s_two_scans"): 610,
}
"""Images a second of the authors' PyTorch code on an H200: autocast to bfloat16, 224 pixels, 512 images (B: 256)."""
PAPER = {
    ("S", "lion_lit"): 0.74,
    ("S", "lion_d"): 1.49,
    ("S", "lion_d_two_scans"): 1.66,
    ("S", "lion_s"): 2.03,
    ("S", "lion_s_two_scans"): 2.72,
    ("B", "lion_lit"): 0.73,
    ("B", "lion_d"): 1.39,
    ("B", "lion_d_two_scans"): 1.48,
    ("B", "lion_s"): 1.46,
    ("B", "lion_s_two_scans"): 1.68,
}
"""Time of a training step, relative to the softmax transformer of the same size (Table 2)."""


def _rate(record: Record) -> float | None:
    return 1e3 * record["batch"] / record["milliseconds"] if record["milliseconds"] else None


def _workers(scale: str) -> int:
    """Processes that compile; each takes some GB of a GPU's memory to find the fastest products."""
    return 1 if scale == "cpu" else min(12, os.cpu_count())


# E3: a training step at 224 pixels.


def _run_training_speed(context: Context) -> Values:
    if context.scale == "cpu":
        cases = training_cases({"Ti": 4}, depth=2, resolution=64)
    else:
        cases = training_cases({"S": 512, "B": 256})
    measured = run_cases(cases, repeats=3 if context.scale == "cpu" else 10, workers=_workers(context.scale))
    return {"scale": context.scale, "cases": [one.record() for one in measured]}


def _rows_training_speed(values: Values) -> list[Row]:
    """Every case, judged by the authors' rates; then the times relative to fused softmax attention."""
    rows = []
    for case in values["cases"]:
        key, rate = (case["size"], case["name"]), _rate(case)
        target, passed = "", None
        if key in AUTHORS and "softmax" not in case["name"]:
            target = f"at least 1.5 x {AUTHORS[key]} images/s"
            passed = None if case["failure"] == UNMEASURED else bool(rate) and rate >= 1.5 * AUTHORS[key]
        ours = f"{rate:.0f} images/s; {cost(case)}" if rate else case["failure"]
        rows.append(Row(f"{case['size']}, batch {case['batch']}: {case['name']}", "", ours, target, passed))
    for size in dict.fromkeys(case["size"] for case in values["cases"]):
        cases = [case for case in values["cases"] if case["size"] == size]
        rows += _against_fused(cases, f"{size}: ", 1.10, lambda name, size=size: PAPER.get((size, name)))
    return rows


def _against_fused(
    cases: Sequence[Record], prefix: str, bound: float, paper: Callable[[str], float | None] = lambda name: None
) -> list[Row]:
    """The times of the variants relative to softmax with fused attention, all of the same work."""
    times = {case["name"]: case["milliseconds"] for case in cases if case["milliseconds"]}
    fused = times.pop("softmax, fused", None)
    if fused is None:
        return []
    rows = []
    for name, milliseconds in times.items():
        printed, ratio = paper(name), milliseconds / fused
        judged = "softmax" not in name
        rows.append(
            Row(
                f"{prefix}{name}, time relative to fused softmax attention",
                "" if printed is None else f"x{printed:.2f}",
                f"x{ratio:.2f}",
                f"goal: at most x{bound:.2f}" if judged else "",
                ratio <= bound if judged else None,
            )
        )
    return rows


def _draw_training_speed(values: Values, path: Path) -> None:
    panels = {}
    for size in dict.fromkeys(case["size"] for case in values["cases"]):
        found = [case for case in values["cases"] if case["size"] == size and case["milliseconds"]]
        panels[f"{size}, training step"] = {case["name"]: [_rate(case)] for case in found}
    names = dict.fromkeys(case["name"] for case in values["cases"])
    figures.dots({name: name for name in names}, panels, "images per second", path)


TRAINING_SPEED = Entry(
    title="Table 2, time: a training step at 224 pixels",
    claim="relative to softmax attention, Small: LION-LIT 0.74, D 1.49, D♮ 1.66, S 2.03, S♮ 2.72; "
    "Base: 0.73, 1.39, 1.48, 1.46, 1.68 (batch, precision and kernels not stated)",
    scales={
        "cpu": "two blocks of Tiny on four images of 64 pixels: shows that everything runs",
        "gpu": "AdamW in bfloat16, images of noise, nothing augmented, the blocks in one loop",
    },
    run=_run_training_speed,
    rows=_rows_training_speed,
    draw=_draw_training_speed,
)


# E4 and E5: resolutions.

FEWER = (512, 1024, 2496)
"""Of the paper's resolutions, what minutes of a GPU are enough for."""


def _run_resolutions(context: Context, training: bool) -> Values:
    resolutions = RESOLUTIONS if context.scale == "paper" else FEWER
    if context.scale == "cpu":
        cases = resolution_cases("Ti", (48, 96), training, by_tokens(80), depth=1)
    elif training:
        cases = resolution_cases("S", resolutions, True, by_tokens(50_000))
    else:
        images = 64 if context.scale == "paper" else 8
        cases = resolution_cases("B", resolutions, False, lambda tokens: images)
    if context.scale == "gpu":
        cases = [_within_minutes(case) for case in cases if not _left_out(case)]
    measured = run_cases(cases, repeats=3, seconds_a_case=2.0, workers=_workers(context.scale))
    return {"scale": context.scale, "cases": [one.record() for one in measured]}


def _left_out(case: Case) -> bool:
    """At scale gpu: naive softmax in training, and all forms but the one with linear work of LION-LIT and LION-D."""
    if case.training:
        return case.name == "softmax, naive"
    return case.mixer in ("lion_lit", "lion_d") and not case.name.endswith("two_sided")


def _within_minutes(case: Case) -> Case:
    """The case, only compiled where it would take long: a scan over single tokens, or chunks with quadratic work."""
    longest = {"recurrent": 512, "chunked": 1024}.get(dict(case.options).get("form"), case.resolution)
    return dataclasses.replace(case, timed=case.resolution <= longest)


def _run_inference(context: Context) -> Values:
    return _run_resolutions(context, training=False)


def _run_training_resolutions(context: Context) -> Values:
    return _run_resolutions(context, training=True)


def _rows_resolutions(values: Values) -> list[Row]:
    rows = []
    for case in values["cases"]:
        what = f"{case['resolution']} px, batch {case['batch']}: {case['name']}"
        rows.append(Row(what, _paper_memory(values["scale"], case), cost(case)))
    return rows


def _rows_training_resolutions(values: Values) -> list[Row]:
    """All cells, and at each resolution whether the variants reach fused softmax attention."""
    rows = _rows_resolutions(values)
    if values["scale"] == "cpu":
        return rows
    for resolution in dict.fromkeys(case["resolution"] for case in values["cases"]):
        cases = [case for case in values["cases"] if case["resolution"] == resolution]
        rows += _against_fused(cases, f"{resolution} px: ", 1.10 if resolution < 512 else 1.0)
    return rows


MEMORY = {
    "softmax, naive": {224: 0.40, 512: 2.44, 738: 8.35, 1024: 27.76, 1248: 58.54},
    "lion_lit, full": {512: 2.82, 738: 9.13, 1024: 29.26, 1248: 60.77},
    "lion_lit, chunked": {512: 2.30, 738: 5.52, 1024: 13.69, 1248: 20.25, 1536: 44.26},
    "lion_d, full": {512: 2.83, 738: 9.18, 1024: 29.45, 1248: 61.19},
    "lion_d, chunked": {512: 2.30, 738: 5.54, 1024: 13.74, 1248: 20.32, 1536: 35.55},
    "lion_s, full": {512: 4.33, 738: 15.55, 1024: 53.34},
    "lion_s, chunked": {512: 3.00, 738: 8.92, 1024: 27.76, 1248: 41.24},
}
"""GB of the authors' code in inference, Base, 64 images on an 80 GB card (figures 1 and 3)."""
RECURRENT = {224: 0.62, 512: 2.06, 738: 4.26, 1024: 8.25, 1248: 12.26, 1536: 18.56, 2496: 49.02}
"""The same for the recurrence of all variants."""


def _paper_memory(scale: str, case: Record) -> str:
    if case["training"] or scale == "cpu":
        return ""
    found = RECURRENT if case["name"].endswith("recurrent") else MEMORY.get(case["name"], {})
    return f"{found[case['resolution']]:.3g} GB (batch 64)" if case["resolution"] in found else ""


def _rows_inference(values: Values) -> list[Row]:
    """All cells, and the two criteria: which form is the fastest from 1024 pixels on, and memory linear in tokens."""
    rows = _rows_resolutions(values)
    fastest = defaultdict(dict)
    for case in values["cases"]:
        if case["milliseconds"]:
            fastest[case["resolution"]][case["name"]] = case["milliseconds"]
    for resolution, times in fastest.items():
        if resolution >= 1024:
            best = min(times, key=times.get)
            rows.append(Row(f"{resolution} px: fastest", "", best, "a two-sided form", best.endswith("two_sided")))
    for name in dict.fromkeys(case["name"] for case in values["cases"]):
        if name.endswith(("recurrent", "two_sided")) and values["scale"] != "cpu":
            found = [c for c in values["cases"] if c["name"] == name and c["gigabytes"] and c["resolution"] >= 512]
            growth = _growth(found)
            if growth is not None:
                rows.append(
                    Row(
                        f"{name}: memory grows as tokens to the power of", "1", f"{growth:.2f}", "<= 1.1", growth <= 1.1
                    )
                )
    return rows


def _growth(cases: Sequence[Record]) -> float | None:
    """The slope of log memory over log tokens, between the fewest and the most; None of fewer than two cases."""
    if len(cases) < 2:
        return None
    first, last = cases[0], cases[-1]
    tokens = [(case["resolution"] // 16) ** 2 + 1 for case in (first, last)]
    return math.log(last["gigabytes"] / first["gigabytes"]) / math.log(tokens[1] / tokens[0])


def _draw_resolutions(values: Values, path: Path) -> None:
    panels: dict[str, dict[str, dict[float, float]]] = {"time": defaultdict(dict), "memory": defaultdict(dict)}
    for case in values["cases"]:
        if case["milliseconds"]:
            panels["time"][case["name"]][case["resolution"]] = case["milliseconds"] / case["batch"]
        if case["gigabytes"]:
            panels["memory"][case["name"]][case["resolution"]] = case["gigabytes"] / case["batch"]
    labels = {"time": "milliseconds per image", "memory": "GB per image"}
    figures.curves(panels, "resolution (pixels)", labels, path)


_RESOLUTION_SCALES = {
    "cpu": "one block of Tiny at 48 and 96 pixels: shows that everything runs; fused attention needs a GPU",
    "gpu": "bfloat16, images of noise, the blocks in one loop; memory is what the compiler plans",
}
INFERENCE = Entry(
    title="Figures 1 and 3: inference by resolution, memory and time of each form",
    claim="the recurrence needs the least memory, the full form is the fastest at low resolution, chunks lie between",
    scales={
        **_RESOLUTION_SCALES,
        "gpu": _RESOLUTION_SCALES["gpu"]
        + "; Base, 8 images instead of 64, fewer resolutions; all forms of LION-S, the recurrence timed up to 512 "
        "pixels and the paper's chunks up to 1024; of LION-LIT and LION-D the form with linear work",
        "paper": _RESOLUTION_SCALES["gpu"] + "; Base, 64 images",
    },
    run=_run_inference,
    rows=_rows_inference,
    draw=_draw_resolutions,
)
TRAINING_RESOLUTIONS = Entry(
    title="A training step by resolution",
    claim="(no counterpart; the paper trains at 224 pixels)",
    scales={
        **_RESOLUTION_SCALES,
        "gpu": _RESOLUTION_SCALES["gpu"] + "; Small, as many images as have 50000 tokens, AdamW; fewer "
        "resolutions, no naive softmax attention",
        "paper": _RESOLUTION_SCALES["gpu"] + "; Small, as many images as have 50000 tokens, AdamW",
    },
    run=_run_training_resolutions,
    rows=_rows_training_resolutions,
    draw=_draw_resolutions,
)


# E6: chunk sizes.


def _run_chunk_sizes(context: Context) -> Values:
    if context.scale == "cpu":
        cases = chunk_cases("Ti", 96, 2, (8, 16), depth=1)
    else:
        cases = chunk_cases("B", 1248, 16, (64, 128, 256, 512, 1024, 2048))
    measured = run_cases(cases, repeats=3, seconds_a_case=3.0, workers=_workers(context.scale))
    return {"scale": context.scale, "cases": [one.record() for one in measured]}


def _rows_chunk_sizes(values: Values) -> list[Row]:
    return [Row(f"{c['resolution']} px, batch {c['batch']}: {c['name']}", "", cost(c)) for c in values["cases"]]


def _draw_chunk_sizes(values: Values, path: Path) -> None:
    panels: dict[str, dict[str, dict[float, float]]] = {"time": defaultdict(dict), "memory": defaultdict(dict)}
    for case in values["cases"]:
        chunk = case["options"].get("chunk_size")
        if chunk and case["milliseconds"]:
            name = f"{case['mixer']}, {case['options']['form']}"
            panels["time"][name][chunk] = case["milliseconds"]
            panels["memory"][name][chunk] = case["gigabytes"]
    figures.curves(panels, "tokens in a chunk", {"time": "milliseconds", "memory": "GB"}, path)


CHUNK_SIZES = Entry(
    title="Figure 4: the size of chunks, time against memory",
    claim="larger chunks are faster and need more memory; beyond 1024 tokens it runs out (80 GB); 8 to 16 chunks are "
    "usual (plot, no numbers)",
    scales={
        "cpu": "one block of Tiny at 96 pixels: shows that everything runs",
        "gpu": "Base, 1248 pixels, 16 images, bfloat16; also the form with linear work, which the paper does not have",
    },
    run=_run_chunk_sizes,
    rows=_rows_chunk_sizes,
    draw=_draw_chunk_sizes,
)
