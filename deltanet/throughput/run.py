"""The comparison of language models in training and decoding: what is measured, as a table and as a figure."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from deltanet.throughput.measure import Decoder, Shape, Step, matrix_rate, training_config
from training import plotting
from training.step import State

Values = dict[str, Any]
_COMPILING = 8  # threads; each program is compiled before the first is timed, so that nothing runs beside a timing


def compare(
    size: str,
    mixers: Sequence[str],
    shapes: Sequence[Shape],
    decode_shapes: Sequence[Shape],
    *,
    steps: int = 2,
    tokens: int = 64,
    repeats: int = 5,
    matrix: int = 8192,
    model: Mapping[str, Any],
    report: Callable[[str], None],
) -> Values:
    """Times training steps of all mixers and shapes, and decoding after all contexts, in one process.

    A program is let go when it has been timed. Compiled programs that wait hold no arrays.

    Args:
      size: a key of `deltanet.language.SIZES`.
      mixers: keys of `deltanet.language.MIXERS`.
      shapes: of training batches.
      decode_shapes: sequences, and the tokens that they have already.
      steps: in a dispatch.
      tokens: that a decoding adds in a dispatch.
      repeats: dispatches that are timed.
      matrix: size of the product whose rate is measured.
      model: further arguments of the model.
      report: is given a line about each result.

    Returns:
      `matrix_rate`, operations a second of a large product; `parameters` by mixer; `training` and `decoding`, by mixer
      and shape. What failed has `skipped` instead of numbers.
    """
    with ThreadPoolExecutor(_COMPILING) as pool:
        training = {
            (mixer, shape): pool.submit(Step, training_config(size, mixer, shape, **model), steps)
            for mixer in mixers
            for shape in shapes
        }
        decoding = {
            (mixer, shape): pool.submit(Decoder, size, mixer, shape, tokens, **model)
            for mixer in mixers
            for shape in decode_shapes
        }
    report(f"{len(training) + len(decoding)} programs are compiled")
    values: Values = {
        "size": size,
        "matrix_rate": matrix_rate(matrix),
        "parameters": {},
        "training": {},
        "decoding": {},
    }
    for mixer in mixers:
        state = None
        for shape in shapes:
            found, state = _train(training.pop((mixer, shape)), state, shape, repeats)
            values["parameters"].setdefault(mixer, found.pop("parameters", None))
            values["training"].setdefault(mixer, {})[str(shape)] = found
            report(f"training {mixer} {shape}: {found}")
        state = None  # before the next model's is made
        for shape in decode_shapes:
            found = _decode(decoding.pop((mixer, shape)), shape, repeats)
            values["decoding"].setdefault(mixer, {})[str(shape)] = found
            report(f"decoding {mixer} {shape}: {found}")
    return values


_FAILURES = (RuntimeError, ValueError, NotImplementedError)


def _skipped(error: Exception) -> Values:
    return {"skipped": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}


def _train(compiled: Future[Step], state: State | None, shape: Shape, repeats: int) -> tuple[Values, State | None]:
    """What a training step does, and the state after it; a failure loses the state."""
    try:
        step = compiled.result()
        seconds, losses, state = step.seconds(step.init() if state is None else state, repeats)
    except _FAILURES as error:
        return _skipped(error), None
    median = statistics.median(seconds)
    found = {
        "parameters": step.parameters,
        "seconds": seconds,
        "tokens_per_second": shape.batch * shape.length / median,
        "peak_bytes": step.peak_bytes,
        "flops": step.flops,
        "flops_per_second": step.flops / median,
        "losses": [losses[0], losses[-1]],
    }
    return found, state


def _decode(compiled: Future[Decoder], shape: Shape, repeats: int) -> Values:
    try:
        decoder = compiled.result()
        seconds = decoder.seconds(repeats)
    except _FAILURES as error:
        return _skipped(error)
    return {
        "seconds": seconds,
        "tokens_per_second": shape.batch / statistics.median(seconds),
        "cache_bytes": decoder.cache_bytes,
    }


def tables(values: Values) -> list[str]:
    """Two Markdown tables, as lines."""
    rate = values["matrix_rate"]
    lines = [
        f"Training, with AdamW and the loss; a product of large bfloat16 matrices runs at {rate / 1e12:.0f} TFLOP/s.",
        "",
        "| model | batch x length | thousand tokens/s | ms a step | TFLOP/s | of the product's rate | peak GiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for mixer, shape, x in _each(values["training"]):
        cells = x.get("skipped") or (
            f"{x['tokens_per_second'] / 1e3:.1f} | {1e3 * statistics.median(x['seconds']):.1f} | "
            f"{x['flops_per_second'] / 1e12:.0f} | {100 * x['flops_per_second'] / rate:.0f} % | "
            f"{x['peak_bytes'] / 2**30:.1f}"
        )
        lines.append(f"| {mixer} | {shape} | {cells} |")
    lines += [
        "",
        "Decoding, the likeliest token each time:",
        "",
        "| model | batch x context | tokens/s | ms a token | cache, MiB a sequence |",
        "|---|---|---|---|---|",
    ]
    for mixer, shape, x in _each(values["decoding"]):
        cells = x.get("skipped") or (
            f"{x['tokens_per_second']:.0f} | {1e3 * statistics.median(x['seconds']):.2f} | "
            f"{x['cache_bytes'] / int(shape.partition('x')[0]) / 2**20:.1f}"
        )
        lines.append(f"| {mixer} | {shape} | {cells} |")
    return lines


def _each(results: Mapping[str, Mapping[str, Values]]) -> list[tuple[str, str, Values]]:
    return [(mixer, shape, found) for mixer, shapes in results.items() for shape, found in shapes.items()]


def draw(values: Values, path: Path) -> None:
    """Tokens a second against the length, in training and in decoding."""
    figure, axes = plotting.figure(2, width=4.5, height=3.5)
    for ax, kind, label in zip(axes[0], ("training", "decoding"), ("length of sequences", "context"), strict=True):
        for mixer, shapes in values[kind].items():
            timed = {
                int(s.partition("x")[2]): x["tokens_per_second"] / 1e3 for s, x in shapes.items() if "seconds" in x
            }
            ax.plot(list(timed), list(timed.values()), "o-", label=mixer)
        ax.set(xscale="log", xlabel=label, ylabel="thousand tokens/s", title=kind, ylim=(0, None))
        ax.set_xticks(list(timed), [str(length) for length in timed])
        ax.minorticks_off()
        ax.legend()
    plotting.save(figure, path)
