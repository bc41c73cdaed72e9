import jax
import pytest

from deltanet.throughput import Shape, Step, flops_per_token, training_config
from deltanet.throughput.reproduce import ENTRIES
from tests.training.test_sharding import run_all
from training.loop import make_program


def test_a_step_runs_and_reports_its_cost():
    config = training_config("tiny", "deltanet", Shape(2, 16), vocabulary_size=10, width=8, depth=1, hidden=8)
    step = Step(config, 2)
    seconds, losses, _ = step.seconds(step.init(), 1)
    assert len(seconds) == 1
    assert len(losses) == 6
    assert losses[0] == pytest.approx(2.3, abs=0.1)
    assert step.peak_bytes > 12 * step.parameters


@pytest.mark.parametrize(
    ("mixer", "length", "mixing"),
    [
        # Per token: a head's products with its state, and those inside a chunk of 64.
        ("deltanet", 64, 8 * (22 * 128**2 + 28 * 64 * 128)),
        ("softmax", 64, 6 * 64 * 1024),
        ("softmax", 2048, 6 * 2048 * 1024),
        ("deltanet_sliding", 64, (8 * (22 * 128**2 + 28 * 64 * 128) + 6 * 64 * 1024) // 2),
    ],
)
def test_operations_of_a_token(mixer, length, mixing):
    counted = []
    config = training_config("340M", mixer, Shape(1, length))

    def count():
        counted.append(flops_per_token(make_program(config).task().init(jax.random.key(0)), length))

    jax.eval_shape(count)
    weights = 24 * (4 * 1024**2 + 3 * 1024 * 2816) + 32_000 * 1024
    deltas = {"softmax": 0, "deltanet": 24, "deltanet_sliding": 12}[mixer]
    weights += deltas * (1024 * 8 + 4 * 3 * 1024)  # step sizes and convolution
    assert counted[0] == 6 * weights + 24 * mixing


TRAIN = """
import json, sys
import numpy as np
from deltanet.throughput import Shape, training_config
from training.loop import Compiled, make_program

losses = []
for data, fsdp in ((1, 1), (2, 2)):
    config = training_config("tiny", sys.argv[1], Shape(4, 70), vocabulary_size=50, dtype="float32", width=64)
    config.mesh.data, config.mesh.fsdp = data, fsdp
    compiled = Compiled(make_program(config))
    state, metrics = compiled.steps(compiled.init(), 0, 3, None)
    losses.append(np.asarray(metrics["loss"]).tolist())
print(json.dumps({"losses": losses}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("mixer", ["deltanet", "softmax", "gla", "mamba2"])
def test_four_devices_train_as_one(mixer):
    (found,) = run_all((TRAIN, mixer), devices=4)
    assert found["losses"][1] == pytest.approx(found["losses"][0], rel=1e-5)


def test_rows_of_the_figure():
    training = {"deltanet": {"16x2048": {"seconds": [0.2], "tokens_per_second": 150e3}, "2x16384": {"skipped": "why"}}}
    decoding = {"deltanet": {"16x2048": {"seconds": [0.1], "tokens_per_second": 160.0, "cache_bytes": 2**21}}}
    rows = ENTRIES["figure6"].rows({"scale": "gpu", "training": training, "decoding": decoding})
    assert [(row.ours, row.passed) for row in rows] == [
        ("150.0", True),
        ("why", False),
        ("1.000", True),
        ("160; 2 MiB of cache", None),
    ]
