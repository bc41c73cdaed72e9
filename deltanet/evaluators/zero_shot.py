"""Zero-shot tests of a language model on their publishers' files (section 4, Table 1; BLiMP besides).

Texts follow the token of a new document. PIQA is asked as lm-evaluation-harness does: `Question: ... Answer: ...`.
"""

from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from data import text
from data.scored_tests import continuations
from data.tokenizers import Tokenizer
from deltanet.evaluators import scores

Results = dict[str, float]


def lambada(model: nnx.Module, tokenizer: Tokenizer, folder: Path, batch: int, longest: int) -> Results:
    """`perplexity` and `accuracy` of the last words of LAMBADA's test set as OpenAI has it."""
    passages = text.lambada_passages(text.read(folder / "lambada", text.LAMBADA)["lambada_test.jsonl"])
    test = continuations(tokenizer, passages, longest)
    graph, state = nnx.split(model)
    score = jax.jit(lambda state, test: scores.lambada(nnx.merge(graph, state), test, batch))
    return {name: float(value) for name, value in score(state, test).items()}


def blimp(model: nnx.Module, tokenizer: Tokenizer, folder: Path, batch: int, longest: int) -> Results:
    """The share of pairs whose acceptable sentence is likelier, by paradigm, and `accuracy`, their mean."""
    paradigms = text.blimp_pairs(text.read(folder / "blimp", text.BLIMP)["BLiMP.zip"])
    sentences = [("", sentence) for pairs in paradigms.values() for pair in pairs for sentence in pair]
    logs = scores.text_scores(model, continuations(tokenizer, sentences, longest), batch)
    ends = np.cumsum([2 * len(pairs) for pairs in paradigms.values()])
    parts = zip(paradigms, np.split(logs, ends[:-1]), strict=True)
    found = {name: scores.share_of_pairs(part, np.zeros(len(part) // 2, int)) for name, part in parts}
    return {"accuracy": float(np.mean(list(found.values()))), **found}


def piqa(model: nnx.Module, tokenizer: Tokenizer, folder: Path, batch: int, longest: int) -> Results:
    """`accuracy` on PIQA's validation questions, and `accuracy_norm` of probabilities per character of the answers."""
    files = text.read(folder / "piqa", text.PIQA)
    questions = text.piqa_questions(files["valid.jsonl"], files["valid-labels.lst"])
    rows = [(f"Question: {goal}\nAnswer:", f" {answer}") for goal, answers, _ in questions for answer in answers]
    logs = scores.text_scores(model, continuations(tokenizer, rows, longest), batch)
    right = np.array([label for *_, label in questions])
    lengths = np.array([len(answer) - 1 for _, answer in rows])
    return {
        "accuracy": scores.share_of_pairs(logs, right),
        "accuracy_norm": scores.share_of_pairs(logs / lengths, right),
    }


TESTS: dict[str, Callable[[nnx.Module, Tokenizer, Path, int, int], Results]] = {
    "lambada": lambada,
    "blimp": blimp,
    "piqa": piqa,
}
"""By name: what measures a model with its tokeniser on the files below a folder."""
