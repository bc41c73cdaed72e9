"""Tables 13, 14 and 16: what an image classifier owes to each part."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lion import figures
from lion.ablations import ARMS
from training.report import Context, Entry, Row

Values = dict[str, Any]

DATASETS = {"eurosat": "EuroSAT", "fashion_mnist": "Fashion-MNIST"}


class Order(NamedTuple):
    """The paper's claim that one arm is better than another."""

    better: str
    worse: str
    paper: str


def _printed(better: str, worse: str) -> Order:
    return Order(better, worse, f"{ARMS[better].paper:.2f} against {ARMS[worse].paper:.2f}")


ORDERS = (
    _printed("softmax", "softmax_bare"),
    _printed("lit", "lit_bare"),
    _printed("s", "softmax"),
    _printed("s", "d"),
    _printed("d", "lit"),
    _printed("s_two_scans", "s"),
    Order("d_two_scans", "d", "79.9 against 73.5 (Small, ImageNet)"),
    _printed("s", "s_vector"),
    _printed("s", "s_forward"),
    _printed("s", "s_backward"),
    _printed("s", "s_alternating"),
    _printed("s_alternating", "s_forward"),
    Order("s", "s_frozen", "a learned gate; the released code's gets no gradient"),
    Order("s", "s_doubled", "claimed, no number"),
    Order("d", "d_doubled", "claimed, no number"),
    Order("s", "s_elu", "the paper's feature map against ELU + 1, no number"),
    Order("lit", "lit_elu", "the paper's feature map against that of its code, no number"),
)


def _run(dataset: str, context: Context) -> Values:
    accuracy = {}
    for arm in ARMS:  # the folders are those of scripts/sweep.py, which can train the arms side by side
        metrics = context.metrics(
            f"ablations/{dataset}/model.arm={arm}",
            f"configs/lion/images.py:dataset={dataset},scale={context.scale}",
            {"model.arm": arm},
        )
        if metrics is not None:
            accuracy[arm] = [100 * value for value in metrics["test/accuracy"]]
    return {"scale": context.scale, "dataset": dataset, "accuracy": accuracy}


def difference(better: Sequence[float], worse: Sequence[float]) -> tuple[float, float]:
    """Difference of the means over seeds, and its standard error (Welch's)."""
    x, y = np.asarray(better), np.asarray(worse)
    return float(x.mean() - y.mean()), float(np.sqrt(x.var(ddof=1) / len(x) + y.var(ddof=1) / len(y)))


def _rows(values: Values) -> list[Row]:
    found = values["accuracy"]
    orders = [order for order in ORDERS if order.better in found and order.worse in found]
    return [
        *(_accuracy(arm, found.get(arm)) for arm in ARMS),
        *(_order(values["scale"], found, order) for order in orders),
        _ranks(found),
    ]


def _accuracy(arm: str, accuracies: Sequence[float] | None) -> Row:
    """Mean and standard deviation over seeds; None where the arm is not trained yet."""
    paper = "" if ARMS[arm].paper is None else f"{ARMS[arm].paper:.2f} (CIFAR-100)"
    if accuracies is None:
        return Row(ARMS[arm].title, paper, "not trained")
    seeds = ", ".join(f"{a:.2f}" for a in accuracies)
    return Row(ARMS[arm].title, paper, f"{np.mean(accuracies):.2f} ± {np.std(accuracies, ddof=1):.2f} ({seeds})")


def _order(scale: str, found: dict[str, list[float]], order: Order) -> Row:
    """Whether the seeds bear out an order: differences below two standard errors decide nothing."""
    gap, error = difference(found[order.better], found[order.worse])
    decided = abs(gap) > 2 * error and scale != "cpu"
    verdict = ("agrees" if gap > 0 else "contradicts the paper") if decided else "undecided"
    return Row(
        f"{ARMS[order.better].title} above {ARMS[order.worse].title}",
        order.paper,
        f"{gap:+.2f} ± {error:.2f}: {verdict}",
        "above zero by two standard errors" if scale != "cpu" else "at scale gpu: above zero by two standard errors",
        gap > 0 if decided else None,
    )


def _ranks(found: dict[str, list[float]]) -> Row:
    """Spearman's rank correlation with the accuracies that the paper prints."""
    arms = [arm for arm in found if ARMS[arm].paper is not None]
    ranks = [np.argsort(np.argsort([score(arm) for arm in arms])) for score in (_paper, lambda a: np.mean(found[a]))]
    correlation = np.corrcoef(*ranks)[0, 1]
    text = f"rank correlation with the paper over {len(arms)} arms"
    return Row(text, "1", f"{correlation:.2f}")


def _paper(arm: str) -> float:
    return ARMS[arm].paper


def _draw(values: Values, path: Path) -> None:
    titles = {arm: ARMS[arm].title for arm in ARMS}
    paper = {arm: [ARMS[arm].paper] for arm in ARMS if ARMS[arm].paper is not None}
    panels = {DATASETS[values["dataset"]]: values["accuracy"], "CIFAR-100, the paper": paper}
    figures.dots(titles, panels, "top-1 accuracy (%)", path)


def _entry(dataset: str, images: str, epochs: dict[str, int]) -> Entry:
    instead = f"{images} instead of CIFAR-100"
    return Entry(
        title=f"Tables 13, 14 and 16 on {DATASETS[dataset]}: positions, decays, directions, scans, diagonal",
        claim="on CIFAR-100, LION-S♮ 80.07 > LION-S 77.56 > softmax 77.33 > LION-D 75.66 > LION-LIT 73.61 > softmax "
        "without positions 73.15 > one direction 69.6 to 71.1 > a decay for each channel 67.55 > LION-LIT without "
        "positions 65.28; counting a token twice is worse (no number)",
        scales={
            "cpu": f"{instead}; two blocks of width 24, two seeds, about a hundred steps: shows that everything runs, "
            "and judges nothing",
            "gpu": f"{instead}, {epochs['gpu']} epochs, three seeds; Tiny's width, half its depth; crop, flip, jitter, "
            "erasing, mixup and cutmix, but no RandAugment",
            "paper": f"{instead}, whose resolution and schedule the paper does not state; {epochs['paper']} epochs, "
            "three seeds",
        },
        run=functools.partial(_run, dataset),
        rows=_rows,
        draw=_draw,
    )


EUROSAT = _entry("eurosat", "EuroSAT (600 images of each class, 64 pixels, patches of 8)", {"gpu": 60, "paper": 300})
FASHION_MNIST = _entry("fashion_mnist", "Fashion-MNIST (28 pixels, patches of 4)", {"gpu": 8, "paper": 100})
