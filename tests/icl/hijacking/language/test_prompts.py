"""Prompts, the tokenizer, and flip times."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from icl.hijacking.language import scoring
from icl.hijacking.language.prompts import KINDS, Fact, read_counterfact, render
from icl.hijacking.language.tokenizer import Tokenizer
from training.errors import UserError

FACT = Fact("sports", "Rafael Nadal", "tennis", "basketball", "Michael Jordan")


def test_prompts():
    sentence = "Rafael Nadal is not good at playing basketball."
    assert render(FACT, 0) == "Rafael Nadal's best sport is"
    assert render(FACT, 2) == f"{sentence} {sentence} Rafael Nadal's best sport is"
    texts = {kind: render(FACT, 1, kind) for kind in KINDS}
    assert texts["other"].startswith("Michael Jordan is not good at playing basketball.")
    assert texts["true"].startswith("Rafael Nadal is good at playing tennis.")
    assert texts["generic"].startswith("Do not think of basketball.")
    assert "basketball" not in texts["neutral"]
    assert all(text.endswith("Rafael Nadal's best sport is") for text in texts.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "sport"}, "did you mean 'sports'"),
        ({"error": "tennis"}, "is the right one"),
        ({"other": "Rafael Nadal"}, "subject other than"),
    ],
)
def test_bad_facts(changes, message):
    with pytest.raises(UserError, match=message):
        Fact(
            **(
                {"task": "sports", "subject": "Rafael Nadal", "correct": "tennis", "error": "golf", "other": "x"}
                | changes
            )
        )


def test_an_unknown_kind():
    with pytest.raises(UserError, match="did you mean 'hijack'"):
        render(FACT, 1, "hijak")


def record(relation, subject, correct, wrong):
    return {
        "requested_rewrite": {
            "relation_id": relation,
            "subject": subject,
            "target_true": {"str": correct},
            "target_new": {"str": wrong},
        }
    }


def test_counterfact(tmp_path):
    path = tmp_path / "facts.json"
    rows = [record("P641", "A", "golf", "chess"), record("P36", "B", "x", "y"), record("P641", "C", "chess", "golf")]
    path.write_text(json.dumps(rows))
    assert read_counterfact(path) == [
        Fact("sports", "A", "golf", "chess", "C"),
        Fact("sports", "C", "chess", "golf", "A"),
    ]
    path.write_text("[{}]")
    with pytest.raises(UserError, match="no CounterFact file"):
        read_counterfact(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_counterfact(tmp_path / "absent.json")


@pytest.fixture(name="tokenizer")
def _tokenizer(tmp_path):
    pieces = [
        "h",
        "e",
        "l",
        "o",
        "Ġ",
        "!",
        "Ã",
        "©",
        "he",
        "ll",
        "hell",
        "hello",
        "Ġhello",
        "1",
        "2",
        "12",
        "Ġh",
        "'",
        "s",
        "'s",
    ]
    (tmp_path / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    merges = ["#version: 0.2", "h e", "l l", "he ll", "hell o", "Ġ hello", "1 2", "' s"]
    (tmp_path / "merges.txt").write_text("\n".join(merges))
    return Tokenizer(tmp_path), pieces


def test_byte_pairs(tokenizer):
    encode, pieces = tokenizer[0].encode, tokenizer[1]

    def read(text):
        return [pieces[token] for token in encode(text)]

    assert read("hello hello!") == ["hello", "Ġhello", "!"]
    assert read("12 hell's") == ["12", "Ġ", "hell", "'s"]
    assert read("é") == ["Ã", "©"]
    assert read("  hello") == ["Ġ", "Ġhello"]
    with pytest.raises(UserError, match="no token for"):
        encode("z")


def test_a_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(UserError, match="holds no tokenizer"):
        Tokenizer(tmp_path)


class CountingModel(nnx.Module):
    """Predicts token 1 until three tokens 5 have gone by, then 2; the answers' second token, 3, always follows."""

    def __call__(self, tokens):
        seen = jnp.cumsum(tokens == 5, axis=1)
        follows = jnp.where((tokens == 1) | (tokens == 2), 3, jnp.where(seen >= 3, 2, 1))
        return 4.0 * (jnp.arange(8) == follows[..., None])


def test_scores_and_flips():
    prompts = [[[4, *[5] * k, 6] for k in range(6)], [[4, *[7] * k, 6] for k in range(6)]]
    answers = [([1, 3], [2, 3]), ([1], [2])]
    scores = scoring.score_tokens(CountingModel(), prompts, answers)
    assert scores.top.tolist() == [[1, 1, 1, 2, 2, 2], [1] * 6]
    log_high = 4 - np.log(np.exp(4) + 7)
    np.testing.assert_allclose(scores.correct[0, :3], 2 * log_high, rtol=1e-5)  # both tokens of the answer
    np.testing.assert_allclose(scores.correct[0, 3:], 2 * log_high - 4, rtol=1e-5)
    np.testing.assert_allclose(scores.error[1], log_high - 4, rtol=1e-5)
    assert scoring.known(scores).tolist() == [True, True]
    assert {name: flips.tolist() for name, flips in scoring.first_flips(scores).items()} == {
        "any": [3, -1],
        "error": [3, -1],
        "pair": [3, -1],
    }


def test_text_scores(tokenizer):
    fact = Fact("sports", "hello", "hell", "he", "hell")

    def encode(text):
        return [len(text) % 7 + 1]

    scores = scoring.score_facts(CountingModel(), encode, [fact], 2)
    assert scores.top.shape == (1, 3)
    assert scores.correct_token.tolist() == [len(" hell") % 7 + 1]


def test_survival_and_flip_times():
    flips = np.array([0, 2, 2, -1])
    np.testing.assert_allclose(scoring.survival(flips, 3), [0.75, 0.75, 0.25, 0.25])
    found = scoring.flip_time(flips, 3)
    assert found.restricted_mean == pytest.approx((0 + 2 + 2 + 4) / 4)
    assert found.restricted_mean == pytest.approx(scoring.survival(flips, 3).sum())
    assert found.flipped_mean == pytest.approx(4 / 3)  # the paper's: it leaves the robust fact out
    assert found.flipped == 0.75
    assert found.low < found.restricted_mean < found.high
    assert np.isnan(scoring.flip_time(np.array([-1, -1]), 3).flipped_mean)
