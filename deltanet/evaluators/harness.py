"""Our language models for lm-evaluation-harness (package `lm_eval`, an optional extra)."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from data.scored_tests import continuations, scored
from data.tokenizers import Tokenizer
from deltanet.evaluators.scores import continuation_scores
from models.sampling import generate
from training.errors import UserError


def harness_model(model: nnx.Module, tokenizer: Tokenizer, longest: int, batch: int = 32) -> Any:
    """An `lm_eval.api.model.LM`, for `lm_eval.simple_evaluate(model=..., tasks=[...])`.

    Args:
      model: a `models.language_model.CausalLanguageModel`.
      tokenizer: its tokeniser.
      longest: tokens of a sequence.
      batch: sequences at a time.

    Raises:
      UserError: the package is missing.
    """
    try:
        from lm_eval.api.model import LM
    except ModuleNotFoundError as error:
        raise UserError("the harness is the package lm_eval: pip install lm_eval") from error
    methods = {name: getattr(_Model, name) for name in ("loglikelihood", "loglikelihood_rolling", "generate_until")}
    instance = type("HarnessModel", (LM,), methods)()
    instance.ours = _Ours(model, tokenizer, longest, batch)
    return instance


class _Ours:
    """What the methods below need."""

    def __init__(self, model: nnx.Module, tokenizer: Tokenizer, longest: int, batch: int) -> None:
        model.eval()
        self.model, self.tokenizer, self.longest, self.batch = model, tokenizer, longest, batch
        graph, state = nnx.split(model)
        self._state = state
        self._score = jax.jit(lambda state, test: continuation_scores(nnx.merge(graph, state), test, batch))

    def score(self, test: Any) -> tuple[np.ndarray, np.ndarray]:
        return tuple(map(np.asarray, self._score(self._state, test)))


class _Model:
    """The three methods of the harness; each request's `args` are its arguments."""

    ours: _Ours

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Logarithm of the probability of a text after a context, and whether greedy decoding would write it."""
        ours = self.ours
        scores, greedy = ours.score(continuations(ours.tokenizer, [r.args for r in requests], ours.longest))
        return list(zip(scores.tolist(), greedy.tolist(), strict=True))

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Logarithm of the probability of a whole text, in windows without context before them."""
        rows, owners, ours = [], [], self.ours
        for number, request in enumerate(requests):
            tokens = np.concatenate([[ours.tokenizer.document], ours.tokenizer.encode(request.args[0])])
            for begin in range(0, len(tokens) - 1, ours.longest):
                rows.append(tokens[begin : begin + ours.longest + 1])
                owners.append(number)
        scores, _ = ours.score(scored(rows, [0] * len(rows)))
        return np.bincount(owners, weights=scores, minlength=len(requests)).tolist()

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations up to the first of the texts in `until`."""
        return [_generated(self.ours, *request.args) for request in requests]


def _generated(ours: _Ours, context: str, options: dict[str, Any]) -> str:
    count = options.get("max_gen_toks", 256)
    prompt = ours.tokenizer.encode(context)[-max(1, ours.longest - count - 1) :]
    prompt = np.concatenate([[ours.tokenizer.document], prompt])[None]
    added = generate(ours.model, prompt, tokens=count, key=jax.random.key(0), temperature=0)
    text = ours.tokenizer.decode(np.asarray(added[0]).tolist())
    until = options.get("until", [])
    for stop in [until] if isinstance(until, str) else until:
        text = text.partition(stop)[0]
    return text
