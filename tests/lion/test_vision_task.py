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
        **{"model": MODEL, "batch_size": 8, "dataset": "noise", "folder": "", "eval_batch": 3, "crop": 2, **options}
    )


def test_batches_see_each_image_once_an_epoch_and_go_on_where_they_were(task):
    batches = task(batch_size=5).batches(0, 0, 1)
    epoch = np.concatenate([next(batches)["image"] for _ in range(4)])
    assert len(np.unique(epoch.reshape(20, -1), axis=0)) == 20
    state, wanted = batches.get_state(), next(batches)
    again = task(batch_size=5).batches(0, 0, 1)
    again.set_state(state)
    jax.tree.map(np.testing.assert_array_equal, next(again), wanted)


def test_processes_share_a_batch_and_copies_stay_together(task):
    whole = next(task(repeats=2).batches(0, 0, 1))
    parts = [next(task(repeats=2).batches(0, i, 2)) for i in range(2)]
    np.testing.assert_array_equal(np.concatenate([p["image"] for p in parts]), whole["image"])
    np.testing.assert_array_equal(whole["image"][::2], whole["image"][1::2])
    assert task().examples_per_epoch == 20


def test_the_loss_and_the_evaluator(task):
    made = task()
    graph, state = nnx.split(made.init(jax.random.key(0)))
    batch = next(made.batches(0, 0, 1))

    def run(state, batch):
        loss, _ = made.loss(nnx.merge(graph, state), batch, jax.random.key(1))
        return loss, made.evaluators()["test"](nnx.merge(graph, state), jax.random.key(2))

    loss, test = jax.jit(run, compiler_options=FAST_COMPILE)(state, batch)
    assert abs(float(loss) - np.log(4)) < 0.2
    model = nnx.merge(graph, state)
    model.eval()
    logits = jax.jit(lambda x: model(made.scaled(x, jnp.float32)), compiler_options=FAST_COMPILE)(made.data.test_images)
    np.testing.assert_allclose(test["accuracy"], np.mean(logits.argmax(-1) == made.data.test_labels))
    scaled = made.scaled(made.data.images, jnp.float32)
    np.testing.assert_allclose(scaled.mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(scaled.std((0, 1, 2)), 1, atol=1e-5)


@pytest.mark.parametrize("options", [{"batch_size": 21}, {"repeats": 3}])
def test_a_batch_that_does_not_fit(task, options):
    with pytest.raises(UserError, match="does not fit the 20 images of noise; change batch_size"):
        task(**options).batches(0, 0, 1)
