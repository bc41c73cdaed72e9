"""Data parallelism and FSDP on eight simulated devices, and two processes; each in an interpreter of its own."""

import contextlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from tests.training.toys import get_config
from training.config import override
from training.errors import UserError
from training.loop import make_program, train
from training.sharding import _fsdp_spec, check_batch, make_mesh

ROOT = Path(__file__).parents[2]

EIGHT_DEVICES = """
import json, sys
import jax, numpy as np
from tests.training.toys import get_config
from training.config import override
from training.loop import Compiled, make_program, train

overrides = json.loads(sys.argv[1])
if "seeds" in overrides:
    overrides["seeds"] = tuple(overrides["seeds"])
config = override(get_config(), overrides)
program = make_program(config)
state = Compiled(program).init()
leaf = state.params["linear"]["kernel"][...]
moment = state.opt_state[1][0].mu["linear"]["kernel"][...]
shards = [list(x.sharding.shard_shape(x.shape)) for x in (leaf, moment)]
result = train(config, sys.argv[2])
again = train(config, sys.argv[2])
assert result.metrics == again.metrics
print(json.dumps({"devices": len(leaf.sharding.device_set), "shards": shards, "metrics": result.metrics}))
"""


def run_all(*calls, devices=1):
    """Runs `(code, *arguments)` calls at the same time; the JSON object that each prints last."""
    environment = {
        **os.environ,
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    results = []
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", *call],
                    env=environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
            for call in calls
        ]
        for process in processes:
            stack.callback(process.kill)
        for process in processes:
            out, err = process.communicate(timeout=240)
            assert process.returncode == 0, err
            results.append(json.loads(out.splitlines()[-1]))
    return results


def on_eight(overrides, workdir):
    common = {"task.features": 8192, "task.noise": 0.1, "optimizer.learning_rate": 1e-4}
    return EIGHT_DEVICES, json.dumps(common | overrides), str(workdir)


@pytest.mark.parametrize("extra", [{}, {"seeds": [0, 1]}, {"optimizer.accumulate": 4}], ids=["one", "seeds", "pieces"])
def test_meshes_agree_with_one_device(extra, tmp_path):
    meshes = {"one": (1, 1), "data": (8, 1), "fsdp": (1, 8), "both": (2, -1)}
    calls = [
        on_eight({"mesh.data": data, "mesh.fsdp": fsdp, **extra}, tmp_path / name)
        for name, (data, fsdp) in meshes.items()
    ]
    results = dict(zip(meshes, run_all(*calls, devices=8), strict=True))
    assert {name: r["devices"] for name, r in results.items()} == {"one": 1, "data": 8, "fsdp": 8, "both": 8}
    rows = {name: {shape[-2] for shape in r["shards"]} for name, r in results.items()}
    assert rows == {"one": {8192}, "data": {8192}, "fsdp": {1024}, "both": {2048}}
    for result in results.values():
        for name, value in results["one"]["metrics"].items():
            np.testing.assert_allclose(result["metrics"][name], value, rtol=2e-5)


def test_the_longest_divisible_axis_is_sharded():
    assert _fsdp_spec((512, 1024), 8, replicas=False) == P(None, "fsdp")
    assert _fsdp_spec((512, 1023), 8, replicas=False) == P("fsdp", None)
    assert _fsdp_spec((1024, 64, 65), 8, replicas=True) == P(None, "fsdp", None)
    assert _fsdp_spec((8, 8), 8, replicas=False) == P()
    assert _fsdp_spec((511, 1023), 8, replicas=False) == P()


def test_a_mesh_that_cannot_be():
    with pytest.raises(UserError, match="needs 16 devices, and there are"):
        make_mesh(4, 4)
    with pytest.raises(UserError, match="cannot be divided"):
        make_mesh(-1, 7)
    with pytest.raises(UserError, match="cannot be divided"):
        make_mesh(-1, -1)


def test_a_batch_that_the_mesh_does_not_divide():
    with pytest.raises(UserError, match=r"batch_size=30 cannot be divided .* multiple of 4, e.g. 32"):
        make_program(override(get_config(), {"batch_size": 30, "optimizer.accumulate": 4}))
    check_batch(32, 4, make_mesh(1, 1))


TWO_PROCESSES = """
import json, sys
import jax
jax.config.update("jax_compilation_cache_dir", None)
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from tests.training.toys import get_config
from training.config import override
from training.loop import train
config = override(get_config(sys.argv[4]), {"mesh.data": -1})
result = train(config, sys.argv[3])
again = train(config, sys.argv[3])
assert again.metrics == json.loads(json.dumps(result.metrics)), (again.metrics, result.metrics)
print(json.dumps(result.metrics))
"""


@pytest.mark.parametrize("data", ["device", "host"])
def test_two_processes(data, tmp_path):
    alone = train(get_config(data), tmp_path / "alone").metrics
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    for result in run_all(*((TWO_PROCESSES, address, str(i), str(tmp_path / "pair"), data) for i in range(2))):
        for name, value in alone.items():
            np.testing.assert_allclose(result[name], value, rtol=2e-5)
    assert len((tmp_path / "pair" / "metrics.jsonl").read_text().splitlines()) >= 40


OVER_EXAMPLES = """
import json
import jax, jax.numpy as jnp
from training.sharding import make_mesh, over_examples

mesh, seen = make_mesh(2, 4), []

def function(x, nothing, y, w):
    seen.append(x.shape)
    return jnp.cumsum(x, 1) * y + w

def loss(x, y, w):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return (over_examples(function, x, None, y, whole=(w,)) ** 2).sum()

results = []
for count in (16, 12):
    x, y, w = jnp.arange(3.0 * count).reshape(count, 3), jnp.ones((count, 3)), jnp.arange(3.0)
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    found = jax.jit(jax.grad(loss, (0, 1, 2)))(jax.device_put(x, whole), y, w)
    wanted = jax.grad(lambda x, y, w: ((jnp.cumsum(x, 1) * y + w) ** 2).sum(), (0, 1, 2))(x, y, w)
    results.append(all(bool(jnp.allclose(a, b)) for a, b in zip(found, wanted, strict=True)))
print(json.dumps({"seen": sorted(set(seen)), "right": results}))
"""


def test_kernels_run_on_each_device_for_its_examples():
    (found,) = run_all((OVER_EXAMPLES,), devices=8)
    assert found == {"seen": [[2, 3], [12, 3]], "right": [True, True]}  # 12 examples cannot be divided among 8
