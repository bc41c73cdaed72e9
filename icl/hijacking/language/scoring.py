"""How many hijacking sentences flip an answer: scores, first flips, and survival curves with their uncertainty.

The paper averages over the samples that flip, which understates robust models. Here samples that never flip are
censored at the largest number of sentences; the paper's own mean is reported beside.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from icl.hijacking.language.prompts import Fact, render

_TOKENS_AT_ONCE = 2**14  # their logits over GPT-2's vocabulary take 3.3 GB


class Scores(NamedTuple):
    """Scores of facts under 0, ..., k_max sentences, each [facts, k_max + 1].

    Attributes:
      top: the most likely next token.
      correct, error: log-probability of the right and of the wrong answer, summed over its tokens.
      correct_token, error_token: first token of the answers, [facts].
    """

    top: np.ndarray
    correct: np.ndarray
    error: np.ndarray
    correct_token: np.ndarray
    error_token: np.ndarray


def score_facts(
    model: nnx.Module, encode: Callable[[str], Sequence[int]], facts: Sequence[Fact], most: int, kind: str = "hijack"
) -> Scores:
    """Scores text prompts; `model` maps tokens [batch, time] to logits [batch, time, vocabulary], causally."""
    answers = [tuple(list(encode(f" {answer}")) for answer in (f.correct, f.error)) for f in facts]
    prompts = [[list(encode(render(f, count, kind))) for count in range(most + 1)] for f in facts]
    return score_tokens(model, prompts, answers)


def score_tokens(
    model: nnx.Module, prompts: Sequence[Sequence[list[int]]], answers: Sequence[tuple[list[int], list[int]]]
) -> Scores:
    """Scores token prompts [facts][k_max + 1] with a right and a wrong answer for each fact.

    Sequences are padded behind, which a causal model does not see; one length serves all, so it is compiled once.
    """
    rows = [(p, a) for group, pair in zip(prompts, answers, strict=True) for p in group for a in pair]
    longest = max(len(prompt) + len(answer) for prompt, answer in rows)
    padded = np.zeros((len(rows), longest), np.int32)
    target = np.zeros((len(rows), longest), bool)  # positions that predict a token of the answer
    for i, (prompt, answer) in enumerate(rows):
        padded[i, : len(prompt) + len(answer)] = prompt + answer
        target[i, len(prompt) - 1 : len(prompt) + len(answer) - 1] = True
    summed, top = (np.concatenate(parts) for parts in zip(*_in_batches(model, padded, target), strict=True))
    shape = len(prompts), -1, 2
    first = np.array([[answer[0] for answer in pair] for pair in answers])
    scores = summed.reshape(shape)
    return Scores(top.reshape(shape)[..., 0], scores[..., 0], scores[..., 1], first[:, 0], first[:, 1])


def _in_batches(model: nnx.Module, padded: np.ndarray, target: np.ndarray) -> list[tuple]:
    parts, size = [], max(1, _TOKENS_AT_ONCE // padded.shape[1])
    for begin in range(0, len(padded), size):
        tokens, marks = (array[begin : begin + size] for array in (padded, target))
        fill = [(0, size - len(tokens)), (0, 0)]
        found = _score(model, np.pad(tokens, fill), np.pad(marks, fill))
        parts.append(tuple(np.asarray(x)[: len(tokens)] for x in found))
    return parts


@nnx.jit
def _score(model: nnx.Module, tokens: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Log-probability of what follows the marked positions, summed, and the likeliest token after the first of them."""
    logits = model(tokens)
    following = jnp.roll(tokens, -1, axis=1)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), following[..., None], axis=-1)[..., 0]
    first = jnp.argmax(target, axis=1)
    at = jnp.take_along_axis(logits, first[:, None, None], axis=1)[:, 0]
    return jnp.where(target, chosen, 0).sum(1), jnp.argmax(at, axis=-1)


def first_flips(scores: Scores) -> dict[str, np.ndarray]:
    """The first number of sentences at which an answer is lost, [facts]; -1 where that never happens.

    `any`: the most likely token is not the right answer's; `error`: it is the wrong answer's; `pair`: the wrong answer
    is more likely than the right one.
    """
    events = {
        "any": scores.top != scores.correct_token[:, None],
        "error": scores.top == scores.error_token[:, None],
        "pair": scores.error > scores.correct,
    }
    return {name: np.where(event.any(1), event.argmax(1), -1) for name, event in events.items()}


def known(scores: Scores) -> np.ndarray:
    """Which facts are answered right without any sentence, [facts]; only these can be hijacked."""
    return scores.top[:, 0] == scores.correct_token


def survival(flips: np.ndarray, most: int) -> np.ndarray:
    """Share of facts not yet flipped after 0, ..., `most` sentences, [most + 1].

    All facts are watched up to `most`, so the Kaplan-Meier estimate is this plain share.
    """
    flipped_at = np.where(flips < 0, most + 1, flips)
    return (flipped_at[None] > np.arange(most + 1)[:, None]).mean(1)


class FlipTime(NamedTuple):
    """The number of sentences that flip an answer.

    Attributes:
      restricted_mean: mean of the flip time, cut at k_max + 1, with a 95 % bootstrap interval over facts.
      low, high: that interval.
      flipped_mean: the paper's mean over those that flip; NaN if none does.
      flipped: the share that flips.
    """

    restricted_mean: float
    low: float
    high: float
    flipped_mean: float
    flipped: float


def flip_time(flips: np.ndarray, most: int, seed: int = 0) -> FlipTime:
    """Summarises first flips [facts], at most `most` sentences."""
    times = np.where(flips < 0, most + 1, flips).astype(float)
    rng = np.random.default_rng(seed)
    means = rng.choice(times, (2000, len(times))).mean(1)
    flipped = times[flips >= 0]
    return FlipTime(
        float(times.mean()),
        *np.quantile(means, (0.025, 0.975)).tolist(),
        float(flipped.mean()) if len(flipped) else float("nan"),
        float((flips >= 0).mean()),
    )


def summary(scores: Scores, most: int) -> dict[str, dict]:
    """For each kind of flip, over the facts that are known: survival curve and flip time, and the efficacy by k."""
    kept = Scores(*(array[known(scores)] for array in scores))
    efficacy = (kept.error > kept.correct).mean(0).tolist()
    return {
        name: {
            "survival": survival(flips, most).tolist(),
            "time": flip_time(flips, most)._asdict(),
            "efficacy": efficacy,
        }
        for name, flips in first_flips(kept).items()
    }
