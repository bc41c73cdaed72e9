"""Documents say what they should, windows are cut from them, and the tasks take a step."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs.icl.hijacking import facts as facts_config
from configs.icl.hijacking import in_context as in_context_config
from icl.hijacking.data import sample_hijack, sample_tasks
from icl.hijacking.in_context import InContextClassification, hijacked_scores
from icl.hijacking.language.corpus import LONGEST, PARAPHRASES, SHORTEST, Documents, Facts, hijacking_prompts
from icl.hijacking.language.task import FactCorpus
from training.config import override
from training.loop import make_program

FACTS = Facts(subjects=5, novel=3, relations=2, values=4)


def sentences(words):
    """Sentences of a document as (subject, relation, value, negated)."""
    assert words[0] == FACTS.document
    groups = [list(g) for end, g in itertools.groupby(words[1:], lambda w: w == FACTS.stop) if not end]
    found = []
    for group in groups:
        negated = group[0] == FACTS.negation
        name, verb, value = group[negated:]
        relation = (verb - 3) // PARAPHRASES
        found.append((name - FACTS.name(0), relation, value - FACTS.value(relation, 0), negated))
    return found


def draw(context, negation, count=200):
    """Documents as lists of words."""
    draw = jax.jit(jax.vmap(Documents(FACTS, context, negation).draw))
    words, lengths = (np.asarray(x) for x in draw(jax.random.split(jax.random.key(0), count)))
    assert lengths.min() >= SHORTEST
    assert words.shape[1] == LONGEST
    return [row[:length].tolist() for row, length in zip(words, lengths, strict=True)]


def kind(document):
    """`stated`, `redrawn` or `denied`, told by its sentences; a redrawn document that happens to be true counts so."""
    found = sentences(document)
    if any(negated for *_, negated in found):
        return "denied"
    return "redrawn" if len({subject for subject, *_ in found}) == 2 else "stated"


def test_words_do_not_collide():
    words = [FACTS.document, FACTS.stop, FACTS.negation]
    words += [FACTS.question(0, r, p)[1] for r in range(2) for p in range(PARAPHRASES)]
    words += [FACTS.name(s) for s in range(8)] + [FACTS.value(r, v) for r in range(2) for v in range(4)]
    assert sorted(words) == list(range(FACTS.vocabulary))


def test_stated_documents_are_true():
    counts = []
    for document in draw(0, 0):
        found = sentences(document)
        counts.append(len(found))
        assert len({subject for subject, *_ in found}) == 1
        assert len({relation for _, relation, *_ in found}) == len(found)
        for subject, relation, value, negated in found:
            assert not negated
            assert value == FACTS.truth[subject, relation]
    assert set(counts) == {1, 2}  # the world has two relations


def test_redrawn_documents_bind_values_to_two_subjects():
    known, orders = [], set()
    for document in draw(1, 0):
        found = sentences(document)
        bound = {subject: value for subject, _, value, _ in found}
        assert len(found) == 4
        assert len({relation for _, relation, *_ in found}) == 1
        assert len(bound) == len(set(bound.values())) == 2
        assert {s for s, *_ in found[:2]} == {s for s, *_ in found[2:]} == set(bound)
        assert all(bound[subject] == value for subject, _, value, _ in found)
        known += [subject < FACTS.subjects for subject in bound]
        orders.add(found[0][0] == found[2][0])
    assert 0.6 < np.mean(known) < 0.85
    assert orders == {True, False}


def test_denials_are_true_and_followed_by_the_fact():
    counts = []
    for document in draw(0, 1):
        *denied, (subject, relation, value, negated) = sentences(document)
        assert value == FACTS.truth[subject, relation]
        assert not negated
        assert len(set(denied)) == 1
        assert all(s == subject and r == relation and v != value and n for s, r, v, n in denied)
        counts.append(len(denied))
    assert set(counts) == {1, 2, 3}


def test_shares_of_documents():
    kinds = [kind(document) for document in draw(0.5, 0.2, 2000)]
    assert np.mean([k == "redrawn" for k in kinds]) == pytest.approx(0.5, abs=0.04)
    assert np.mean([k == "denied" for k in kinds]) == pytest.approx(0.2, abs=0.04)


def test_windows_are_packed_documents_from_any_word_on():
    length = 31
    windows = cut(Documents(FACTS, 0.5, 0.2), 300, length)
    assert windows.shape == (300, length)
    assert np.mean(windows[:, 0] == FACTS.document) == pytest.approx(1 / 13, abs=0.06)
    for window in windows:
        begins = np.flatnonzero(window == FACTS.document)
        assert np.all(np.diff(begins) >= SHORTEST)
        assert np.all(window[begins[begins > 0] - 1] == FACTS.stop)
        for begin, end in itertools.pairwise(begins):
            assert kind(window[begin:end].tolist())
    assert np.all(cut(Documents(FACTS, 0, 0), 50, 200)[:, -20:] < FACTS.vocabulary)


def cut(documents, count, length):
    return np.asarray(jax.jit(lambda key: documents.windows(key, count, length))(jax.random.key(0)))


@pytest.mark.parametrize("other", [False, True])
def test_hijacking_prompts(other):
    prompts, answers = hijacking_prompts(FACTS, 20, 3, other)
    for group, (right, wrong) in zip(prompts, answers, strict=True):
        for count, prompt in enumerate(group):
            *denied, (subject, relation, value, _) = sentences([*prompt, right[0]])
            assert value == FACTS.truth[subject, relation]
            assert len(denied) == count
            for denied_subject, _, denied_value, negated in denied:
                assert negated
                assert (denied_subject == subject) != other
                assert FACTS.value(relation, denied_value) == wrong[0]
                assert FACTS.truth[denied_subject, relation] != denied_value


def test_the_control_asks_the_same_questions():
    attack, control = (hijacking_prompts(FACTS, 20, 1, other) for other in (False, True))
    assert attack[1] == control[1]
    assert [group[0] for group in attack[0]] == [group[0] for group in control[0]]
    assert {len(a) for a in attack[0][0]} == {len(c) for c in control[0][0]}


def test_the_corpus_task():
    task = FactCorpus(
        {"name": "icl.hijacking.language.task.small_gpt2", "layers": 1, "width": 8, "heads": 2},
        batch_size=4,
        subjects=5,
        novel=3,
        length=16,
        questions=8,
    )
    model, batch = task.init(jax.random.key(0)), task.batch(jax.random.key(0), 0)
    loss, _ = nnx.jit(task.loss)(model, batch, jax.random.key(0))
    assert float(loss) == pytest.approx(np.log(task.facts.vocabulary), rel=0.05)
    results = {name: nnx.jit(evaluate)(model, jax.random.key(0)) for name, evaluate in task.evaluators().items()}
    assert 0 <= results["recall"]["accuracy"] <= 1
    assert results["stated"]["loss"] > 0


def test_the_in_context_model_reads_only_what_came_before():
    task = InContextClassification(
        {"name": "icl.hijacking.in_context.InContextGPT2", "layers": 2, "width": 8, "heads": 2},
        batch_size=4,
        dimension=3,
        examples=5,
    )
    model, batch = task.init(jax.random.key(0)), task.batch(jax.random.key(1), jnp.int32(0))
    run = nnx.jit(lambda model, x, y: model(x, y))
    scores = run(model, *batch)
    assert scores.shape == (4, 6)
    changed = run(model, batch.x, batch.y.at[:, 3].multiply(-1))
    np.testing.assert_allclose(changed[:, :4], scores[:, :4], atol=1e-6)
    assert np.abs(changed[:, 4:] - scores[:, 4:]).max() > 1e-6
    hijack = sample_hijack(jax.random.key(2), sample_tasks(jax.random.key(3), 3, 0.1, 7), 0.1)
    tokens = jnp.stack([hijack.x_token.T, hijack.x_token.T, hijack.x_query.T], axis=1)
    labels = jnp.tile(-hijack.y_query[:, None], (1, 3))
    ours = hijacked_scores(model, hijack, jnp.int32(2), 5)
    np.testing.assert_allclose(ours, model(tokens, labels)[:, 2], atol=1e-6)


@pytest.mark.parametrize("module", [facts_config, in_context_config])
@pytest.mark.parametrize("scale", ["cpu", "gpu"])
def test_configs_are_valid(module, scale):
    config = module.get_config(f"scale={scale}")
    for point in module.sweep()[::9]:
        make_program(override(config, point))
