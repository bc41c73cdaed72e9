from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from lion.vision import MIXERS
from training import config as configs
from training.errors import UserError
from training.loop import make_program, train

ROOT = Path(__file__).parents[2]
FOLDER = str(ROOT / "tests" / "data" / "prepared")
PARAMETERS = {("Ti", "lion_d"): 5_679_628, ("S", "lion_s"): 22_002_736, ("B", "lion_d_two_scans"): 86_416_504 + 144}


def imagenet(variant="S", mixer="lion_s"):
    return configs.load(f"{ROOT}/configs/lion/imagenet.py:variant={variant},mixer={mixer}")


def tiny():
    """The configuration of ImageNet, on a set of the same format and a model that fits it."""
    config = imagenet().unlock()
    config.task.update({"dataset": "tiny_images", "data_dir": FOLDER, "classes": 3, "examples": 12})
    config.task.update({"eval_examples": 5, "image_size": 32, "workers": 0})
    config.model.update({"width": 12, "heads": 3, "depth": 1})
    config.update({"steps": "2 epochs", "batch_size": 6, "ema_decay": 0.5, "seeds": (0,)})
    config.optimizer.warmup = "1 step"
    config.eval_every = config.checkpoint_every = "1 epoch"
    return config.lock()


@pytest.mark.slow
def test_two_epochs_of_the_whole_recipe(tmp_path):
    metrics = train(tiny(), tmp_path).metrics
    assert set(metrics) == {"loss", "test/accuracy", "test/loss", "test_ema/accuracy", "test_ema/loss"}
    assert 0 <= metrics["test/accuracy"] <= 1
    assert abs(metrics["loss"] - np.log(3)) < 0.5
    assert metrics["test/loss"] != metrics["test_ema/loss"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": 1000}, "has 3 classes and 12 examples in 'train'; the task expects 1000 classes"),
        ({"examples": 1_281_167}, "set task.classes and task.examples"),
        ({"data_dir": "/nowhere"}, "/nowhere holds no prepared tiny_images; prepare it with"),
    ],
)
def test_a_set_that_is_another_or_not_there(changes, message):
    config = tiny().unlock()
    config.task.update(changes)
    with pytest.raises(UserError, match=message):
        make_program(config).task().batches(0, 0, 1)


@pytest.mark.parametrize("case", PARAMETERS, ids="-".join)
def test_the_training_step_at_full_scale_has_the_papers_size(case):
    """Shapes, parameters and arithmetic of the step that would be trained; nothing is compiled or run."""
    config = imagenet(*case).unlock()
    config.model.unroll = 12  # the analysis would count the body of a loop once
    program = make_program(config)
    assert program.total_steps == -(-300 * 1_281_167 // 1024)
    state = jax.eval_shape(program.init, program.replicas)
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert count == PARAMETERS[case]
    assert jax.tree.map(jnp.shape, state.average) == jax.tree.map(jnp.shape, state.params)
    batch = {
        "image": jax.ShapeDtypeStruct((1, 1024, 224, 224, 3), jnp.uint8),
        "label": jax.ShapeDtypeStruct((1, 1024), jnp.int32),
    }
    lowered = jax.jit(program.steps, static_argnames="length").lower(
        state, program.replicas, np.int32(0), length=1, batches=batch
    )
    flops = lowered.cost_analysis()["flops"]
    tokens = 1024 * 197
    assert 0.9 < flops / (6 * count * tokens) < 2.5  # six for each parameter and token, and the attention
    new_state, metrics = lowered.out_info
    assert jax.tree.map(jnp.shape, new_state) == jax.tree.map(jnp.shape, state)
    assert metrics["loss"].shape == (1,)


@pytest.mark.slow
def test_the_step_compiles():
    config = imagenet("Ti", "lion_s").unlock()
    config.batch_size = 8
    program = make_program(config)
    state = jax.eval_shape(program.init, program.replicas)
    batch = {
        "image": jax.ShapeDtypeStruct((1, 8, 224, 224, 3), jnp.uint8),
        "label": jax.ShapeDtypeStruct((1, 8), jnp.int32),
    }
    step = jax.jit(program.steps, static_argnames="length")
    memory = step.lower(state, program.replicas, np.int32(0), length=1, batches=batch).compile().memory_analysis()
    assert memory.argument_size_in_bytes > 4 * 4 * 5_600_000  # parameters, their average and two moments
    assert memory.temp_size_in_bytes < 4e9


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_mixer_has_a_configuration(mixer):
    assert imagenet(mixer=mixer).model.position_embedding == (mixer in ("softmax", "lion_lit"))


def test_deltanet_in_both_directions():
    program = make_program(imagenet("Ti", "deltanet"))
    state = jax.eval_shape(program.init, program.replicas)
    assert sum(leaf.size for leaf in jax.tree.leaves(state.params)) == 5_679_592 + 12 * 3 * 193


def test_an_unknown_mixer():
    with pytest.raises(UserError, match="mixer='lion_r' does not exist: did you mean"):
        imagenet(mixer="lion_r")
    assert isinstance(imagenet(), ConfigDict)
