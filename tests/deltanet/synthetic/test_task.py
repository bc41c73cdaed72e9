"""The task on a tiny benchmark: batches, loss, metrics and models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deltanet.synthetic.models import MIXERS, mad_model, mqar_model, regbench_model
from deltanet.synthetic.reproduce import ENTRIES, best
from deltanet.synthetic.task import SyntheticTask, measured
from deltanet.synthetic.tokens import IGNORE
from training import config as configs
from training.errors import UserError

DATA = {"name": "deltanet.synthetic.mqar.mqar", "length": 16, "pairs": 2, "vocabulary": 32, "train": 10, "test": 7}
MODEL = {
    "name": "deltanet.synthetic.models.mqar_model",
    "mixer": "linear_attention",
    "width": 8,
    "length": 16,
    "dtype": "float32",
}


def task(**options):
    one = SyntheticTask(MODEL, 3, DATA, **options)
    return SyntheticTask(MODEL, 3, DATA, **options, resident=jax.tree.map(jnp.asarray, one.residents()))


@pytest.mark.parametrize("shuffle", [False, True])
def test_an_epoch_has_every_example_at_most_once(shuffle):
    one = task(shuffle=shuffle)
    examples = one.benchmark.train.tokens.tolist()
    epochs = [
        [
            examples.index(row.tolist())
            for i in range(3)
            for row in one.batch(jax.random.key(0), 3 * epoch + i)["tokens"]
        ]
        for epoch in range(2)
    ]
    assert all(len(set(epoch)) == 9 for epoch in epochs)
    assert (epochs[0] == epochs[1]) != shuffle
    assert (epochs[0] == list(range(9))) != shuffle


def test_the_loss_is_the_cross_entropy_of_the_labels():
    one = task(shuffle=False)
    model, batch = one.init(jax.random.key(1)), one.batch(jax.random.key(0), 0)
    model.dropout.rate = 0.0
    loss, metrics = one.loss(model, batch, jax.random.key(2))
    logits = jax.nn.log_softmax(model(batch["tokens"], rngs=nnx.Rngs(dropout=0)))
    asked = np.asarray(batch["labels"]) != IGNORE
    expected = -np.take_along_axis(np.asarray(logits), np.where(asked, batch["labels"], 0)[..., None], -1)[asked].mean()
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    right = (np.asarray(logits).argmax(-1) == np.asarray(batch["labels"]))[asked].mean()
    assert float(metrics["accuracy"]) == pytest.approx(right)


class Fixed(nnx.Module):
    """A model that predicts the token which the input shows, with a margin."""

    def hidden(self, tokens):
        return jax.nn.one_hot(tokens, 4)

    def logits(self, hidden):
        return 9.0 * hidden


def test_metrics():
    tokens = np.array([[[0, 1, 1, 3]], [[2, 2, 0, 0]]], np.int16)
    labels = np.array([[[0, 1, 0, IGNORE]], [[IGNORE, 0, 0, 0]]], np.int16)
    legal = np.array([[[1, 1, 2, 0]], [[0, 4, 1, 2]]], np.int32)
    results = measured(Fixed(), {"tokens": tokens, "labels": labels, "legal": legal}, 3, 4)
    assert float(results["accuracy"]) == pytest.approx(4 / 6)
    # Recall of token 0 is 3/5, of token 1 it is 1; token 2 is predicted but never right; token 3 does not count.
    assert float(results["macro_accuracy"]) == pytest.approx((3 / 5 + 1 + 0) / 3)
    assert float(results["legal_accuracy"]) == pytest.approx(4 / 6)
    missed = np.log(np.exp(9) + 3)
    assert float(results["loss"]) == pytest.approx(missed - 9 * 4 / 6, rel=1e-5)


def test_filled_up_batches_do_not_count():
    model = task().init(jax.random.key(0))
    whole, filled = (task(eval_batch=size).evaluators()["test"](model, None) for size in (7, 5))
    for name, value in whole.items():
        assert float(filled[name]) == pytest.approx(float(value), rel=1e-5), name


@pytest.mark.parametrize("mixer", MIXERS)
def test_models_are_built_for_every_mixer(mixer):
    def hidden():
        rngs, common = nnx.Rngs(0), {"dtype": "float32", "vocabulary_size": 32}
        tokens = jnp.zeros((2, 16), jnp.int32)
        models = (
            mqar_model(mixer, 64, length=16, rngs=rngs, **common),
            mad_model(mixer, autoencoder=True, rngs=rngs, **common),
            mad_model(mixer, rngs=rngs, **common),
            regbench_model(mixer, depth=1, rngs=rngs, **common),
        )
        return [model.hidden(tokens, rngs=nnx.Rngs(dropout=0)) for model in models]

    assert [x.shape for x in jax.eval_shape(hidden)] == [(2, 16, 64)] + [(2, 16, 128)] * 3


def test_the_autoencoder_decodes_from_the_last_token_only():
    model = mad_model(
        "linear_attention", width=16, autoencoder=True, dtype="float32", rngs=nnx.Rngs(0), vocabulary_size=8
    )
    inner = nnx.split(model)

    def decoded(tokens):
        return nnx.merge(*inner).hidden(tokens)

    base = jnp.array([[1, 2, 3, 7]])
    one = decoded(base)
    assert (one[0, 0] != one[0, 1]).any()  # positions differ by their code
    other = decoded(base.at[0, 0].set(4))
    assert (one != other).any(-1).all()  # the first token reaches every position, through the last


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(UserError, match="more than the 10"):
        SyntheticTask(MODEL, 11, DATA).residents()


def test_the_best_replica_counts():
    assert best([0.1, float("nan"), 0.5], [0.1, float("nan"), 0.5]) == 0.5
    assert best([1, 2], [0.9, 0.1]) == 1
    assert best(0.3, 0.3) == 0.3
    assert best([float("nan")], [float("nan")]) == 0


def test_trainings_of_a_grid():
    class Finished:
        scale, asked = "gpu", []

        def metrics(self, name, config, overrides):
            configs.override(configs.load(config), overrides)
            self.asked.append(name)
            return None if "retnet" in name else {"test/accuracy": [0.2, len(self.asked) / 100]}

    found = ENTRIES["figure4"].run(Finished())["found"]
    assert Finished.asked[:4] == [
        f"mqar/{part}model.mixer=deltanet_no_conv" for part in ("64/", "64/seed=1/", "64/seed=2/", "128/")
    ]
    assert found["deltanet_no_conv"]["64"] == [20, 20, 20]
    assert "retnet" not in found
    assert len(found["softmax"]["512"]) == 1
