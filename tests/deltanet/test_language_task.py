import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data import scored_tests, token_shards
from data.tokenizers import Bytes
from deltanet.language_task import DeviceText, HostText
from training import config as configs
from training import loop
from training.config import base_config
from training.errors import UserError

ROOT = Path(__file__).parents[2]
LENGTH, BATCH = 16, 4
MODEL = {
    "name": "deltanet.language.language_model",
    "size": "tiny",
    "mixer": "softmax",
    "width": 64,
    "depth": 1,
    "vocabulary_size": 257,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    documents = [f"{i} times {i} is {i * i}.\n" for i in range(40)]
    token_shards.write(folder, Bytes(), {"train": documents, "test": documents[:5]}, size=200)
    scored_tests.save(folder / "squares.npz", scored_tests.continuations(Bytes(), [("2 times 2 is", " 4")]))
    return str(folder)


def make(cls, folder, **options):
    return cls(model=MODEL, batch_size=BATCH, folder=folder, length=LENGTH, **options)


def test_device_batches_are_windows_and_an_epoch_has_each_once(folder):
    task = make(DeviceText, folder)
    tokens = task.residents()["training tokens"]
    task = make(DeviceText, folder, resident=jax.tree.map(jnp.asarray, task.residents()))
    steps = task.examples_per_epoch // BATCH
    make_batch = jax.jit(task.batch)
    batches = [jax.tree.map(np.asarray, make_batch(jax.random.key(0), jnp.int32(i))) for i in range(2 * steps)]
    text = tokens.astype(np.uint16).tobytes()
    starts = []
    for batch in batches:
        assert batch["tokens"].dtype == batch["labels"].dtype == jnp.int32
        np.testing.assert_array_equal(batch["tokens"][:, 1:], batch["labels"][:, :-1])
        np.testing.assert_array_equal(batch["weights"], 1)
        for row, label in zip(batch["tokens"], batch["labels"][:, -1:], strict=True):
            window = np.concatenate([row, label]).astype(np.uint16).tobytes()
            assert window in text
            starts.append(text.index(window) // 2)
    for epoch in (starts[: steps * BATCH], starts[steps * BATCH :]):
        assert len({start // LENGTH for start in epoch}) == len(epoch)
        assert len({start % LENGTH for start in epoch}) == 1
    assert starts[: steps * BATCH] != starts[steps * BATCH :]


def test_documents_are_told_apart_where_asked(folder):
    batch = next(make(HostText, folder, reset=True).batches(0, 0, 1))
    expected = np.cumsum(batch["tokens"] == Bytes.document, axis=1)
    np.testing.assert_array_equal(batch["segment_ids"], expected)
    assert "segment_ids" not in next(make(HostText, folder).batches(0, 0, 1))


def config(folder, cls, steps):
    config = base_config()
    config.task = {
        "name": f"deltanet.language_task.{cls}",
        "folder": folder,
        "length": LENGTH,
        "held_out": ("test",),
        "tests": ("squares",),
    }
    config.model = MODEL
    config.batch_size, config.steps, config.steps_per_dispatch = BATCH, f"{steps} steps", 2
    config.eval_every, config.checkpoint_every = "0 steps", "2 steps"
    return config


@pytest.mark.parametrize("cls", ["DeviceText", "HostText"])
def test_a_stopped_run_goes_on_as_if_it_had_not(folder, tmp_path, cls, monkeypatch):
    whole = loop.train(config(folder, cls, 6), tmp_path / "whole").metrics
    assert whole["loss"] < 5.5
    assert {"test/word_perplexity", "test/loss_by_position", "squares/accuracy"} <= set(whole)
    taken, save = [], loop.Checkpoints.save

    def save_and_stop(self, step, *arguments):
        save(self, step, *arguments)
        taken.append(step)
        if step == 4:
            self.wait()
            raise KeyboardInterrupt

    monkeypatch.setattr(loop.Checkpoints, "save", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        loop.train(config(folder, cls, 6), tmp_path / "cut")
    resumed = loop.train(config(folder, cls, 6), tmp_path / "cut").metrics
    assert taken == [2, 4, 6]
    np.testing.assert_equal(resumed, whole)
    json.dumps(resumed)


def test_errors(folder):
    with pytest.raises(UserError, match=r"set model.vocabulary_size=257"):
        DeviceText(model={**MODEL, "vocabulary_size": 9}, batch_size=2, folder=folder, length=8).init(jax.random.key(0))
    with pytest.raises(UserError, match="too few for windows of 100000"):
        _ = DeviceText(model=MODEL, batch_size=2, folder=folder, length=100_000).examples_per_epoch
    with pytest.raises(UserError, match="there are no prepared texts in /nowhere"):
        make(DeviceText, "/nowhere").residents()


def test_the_language_models_config_trains_on_prepared_texts(tmp_path):
    documents = [f"{i} and {i} are {2 * i}.\n" for i in range(60)]
    token_shards.write(tmp_path / "texts", Bytes(), {"train": documents, "validation": documents[:20]}, size=200)
    config = configs.load(f"{ROOT}/configs/deltanet/language.py:size=tiny,data={tmp_path}/texts,runlocal=true")
    result = loop.train(config, tmp_path / "run")
    assert result.metrics["loss"] > result.metrics["validation/loss"] > 0
    state = loop.Checkpoints(tmp_path / "run", 1).restore(loop.Compiled(loop.make_program(config)).abstract_state)
    assert state.iterator == 4


def test_the_language_models_config_names_what_is_missing(tmp_path):
    config = configs.load(f"{ROOT}/configs/deltanet/language.py:size=340M,data={tmp_path}/texts")
    with pytest.raises(UserError, match=f"no prepared texts in {tmp_path}/texts; see python scripts/prepare_data.py"):
        loop.make_program(config)
