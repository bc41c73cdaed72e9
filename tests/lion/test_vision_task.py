import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from data import images
from data.images import ImageSet
from lion.vision_task import ImageClassification
from training.errors import UserError

FAST_COMPILE = {"xla_backend_optimization_level": 0}
MODEL = {
    "name": "lion.vision.vision_transformer",
    "size": "Ti",
    "mixer": "lion_s",
    "patch": 4,
    "width": 12,
    "heads": 3,
    "depth": 1,
}


@pytest.fixture
def task(monkeypatch):
    """A task on random images; `task(**options)` makes one."""
    rng = np.random.default_rng(0)
    data = ImageSet(
        rng.integers(0, 256, (20, 8, 8, 3), np.uint8),
        rng.integers(0, 4, 20, np.uint8),
        rng.integers(0, 256, (7, 8, 8, 3), np.uint8),
        rng.integers(0, 4, 7, np.uint8),
        classes=4,
    )
    monkeypatch.setitem(images.SOURCES, "noise", lambda folder: data)
    return lambda **options: ImageClassification(
        **{
            "model": MODEL,
            "batch_size": 8,
            "dataset": "noise",
            "folder": "",
            "eval_batch": 3,
            "augment": {"crop": 2},
            **options,
        }
    )


def resident(made):
    """The task as the loop builds it, with its data on the device."""
    return dataclasses.replace(made, resident=jax.tree.map(jnp.asarray, made.residents()))


def test_an_epoch_has_each_image_once_in_an_order_of_its_own(task):
    made = resident(task(batch_size=5))
    batch = jax.jit(made.batch)
    epochs = [
        np.concatenate([batch(jax.random.key(0), step)["image"] for step in steps]) for steps in (range(4), range(4, 8))
    ]
    assert len(np.unique(epochs[0].reshape(20, -1), axis=0)) == 20
    assert not np.array_equal(*epochs)
    np.testing.assert_array_equal(*(np.sort(epoch.reshape(20, -1), 0) for epoch in epochs))
    other = batch(jax.random.key(1), 0)
    assert not np.array_equal(other["image"], epochs[0][:5])
    rows = [np.flatnonzero((made.data.images == image).all((1, 2, 3)))[0] for image in other["image"]]
    np.testing.assert_array_equal(other["label"], made.data.labels[rows])


def test_copies_of_an_image_stand_side_by_side(task):
    images = resident(task(repeats=2)).batch(jax.random.key(0), 1)["image"]
    np.testing.assert_array_equal(images[::2], images[1::2])
    assert len(np.unique(images.reshape(8, -1), axis=0)) == 4
    assert task().examples_per_epoch == 20


def test_the_loss_and_the_evaluator(task):
    made = resident(task())
    graph, state = nnx.split(made.init(jax.random.key(0)))
    batch = made.batch(jax.random.key(0), 0)

    def run(state, batch):
        loss, _ = made.loss(nnx.merge(graph, state), batch, jax.random.key(1))
        return loss, made.evaluators()["test"](nnx.merge(graph, state), jax.random.key(2))

    loss, test = jax.jit(run, compiler_options=FAST_COMPILE)(state, batch)
    assert abs(float(loss) - np.log(4)) < 0.2
    model = nnx.merge(graph, state)
    model.eval()
    logits = jax.jit(lambda x: model(made.moments.scaled(x)), compiler_options=FAST_COMPILE)(made.data.test_images)
    np.testing.assert_allclose(test["accuracy"], np.mean(logits.argmax(-1) == made.data.test_labels))
    scaled = made.moments.scaled(made.data.images)
    np.testing.assert_allclose(scaled.mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(scaled.std((0, 1, 2)), 1, atol=1e-5)


@pytest.mark.parametrize("options", [{"batch_size": 21}, {"repeats": 3}])
def test_a_batch_that_does_not_fit(task, options):
    with pytest.raises(UserError, match="does not fit the 20 images of noise; change batch_size"):
        task(**options).residents()
