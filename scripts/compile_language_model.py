"""Compiles training steps of the paper's sizes for 8 and 64 GPUs that are not here, and records what they need.

  pip install --no-deps jax-cuda13-plugin==0.11.2 jax-cuda13-pjrt==0.11.2     beside JAX 0.11.2; and ptxas, from CUDA 13
  python scripts/compile_language_model.py

Writes language_model_compiled.json and .md into the results folder: for each step its memory on a device, as the
compiler lays it out, the operations that the model needs, and the collectives. Nothing is run, so nothing is known of
its speed. Memory and collectives are those of the H200's code, compiled without the autotuning that needs the device.
"""

import argparse
import functools
import json
import os
import re
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec  # noqa: E402

from deltanet.delta_rule import api as delta_rule  # noqa: E402
from deltanet.throughput import flops_per_token  # noqa: E402
from models.short_convolution import api as short_convolution  # noqa: E402
from training.config import load  # noqa: E402
from training.provenance import provenance  # noqa: E402
from training.sharding import check_batch, state_shardings  # noqa: E402
from training.step import Program  # noqa: E402

CONFIG = "configs/deltanet/language.py"
FSDP = 8  # devices of a host, over which parameters and optimiser state are split
# Size and devices to micro-batches of a step; more devices hold fewer sequences each.
PROBLEMS = {("340M", 8): 2, ("340M", 64): 1, ("1.3B", 8): 16, ("1.3B", 64): 2}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

H200 = """
gpu_device_info {
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  core_count: 132 threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 fpus_per_core: 128 clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  device_memory_size: 150000000000 memory_bandwidth: 4800000000000 l2_cache_size: 52428800 name: "NVIDIA H200"
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0"
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 } device_description_str: "NVIDIA H200"
"""


def make_mesh(devices: int) -> Mesh:
    """Absent H200s, eight in a host."""
    topology = topologies.get_topology_desc(platform="cuda", target_config=H200, topology=f"1x{devices // FSDP}x{FSDP}")
    grid = np.array(topology.devices).reshape(devices // FSDP, FSDP)
    return Mesh(grid, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def compile_step(size: str, devices: int, accumulate: int) -> dict[str, Any]:
    """What the compiler says of one optimiser step."""
    config = load(f"{CONFIG}:size={size}").copy_and_resolve_references()
    config.unlock()
    config.task = {"name": "deltanet.throughput.RandomTokens", "length": config.task.length, "chunk": config.task.chunk}
    config.optimizer.accumulate = accumulate
    mesh = make_mesh(devices)
    check_batch(config.batch_size, accumulate, mesh)
    program = Program(config, mesh, 1000)
    shapes = jax.eval_shape(program.init, program.replicas)
    shardings = state_shardings(shapes, mesh, replicas=False)
    whole = NamedSharding(mesh, PartitionSpec())
    state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
    rest = (program.replicas, np.int32(0))
    rest = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), x.dtype, sharding=whole), rest)
    step = jax.jit(functools.partial(program.steps, length=1), donate_argnums=0, out_shardings=(shardings, whole))
    begin = time.monotonic()
    compiled = step.lower(state, *rest).compile()
    memory = compiled.memory_analysis()
    counts = Counter(re.findall(rf"\b({'|'.join(COLLECTIVES)})(?:-start)?\(", compiled.as_text()))
    tokens = config.batch_size * config.task.length
    return {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(shapes.params)),
        "sequences_per_device": config.batch_size // devices,
        "length": config.task.length,
        "micro_batches": accumulate,
        "remat": config.model.remat,
        "state_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "flops_per_device": tokens / devices * _flops(program, config.task.length),
        "collectives": dict(counts),
        "compile_seconds": round(time.monotonic() - begin, 1),
    }


def _flops(program: Program, length: int) -> float:
    found = []
    jax.eval_shape(lambda: found.append(flops_per_token(program.task().init(jax.random.key(0)), length)))
    return found[0]


def table(record: dict[str, Any]) -> str:
    """The record as a Markdown page."""
    lines = [
        "# Training steps of the paper's sizes, compiled for many GPUs",
        "",
        "DeltaNet, one optimiser step (loss and AdamW) in bfloat16 with float32 parameters, compiled for absent H200s,",
        f"{FSDP} of which share parameters and optimiser state; further ones hold further examples. Memory is of one",
        "device as the compiler lays it out; operations are those the model needs, without what is computed twice.",
        "",
        "| size | GPUs | sequences a GPU | micro-batches | state, GiB | temporary, GiB | TFLOP a GPU | collectives |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, step in record["steps"].items():
        size, devices = name.split(" on ")
        collectives = ", ".join(f"{count} {kind}" for kind, count in sorted(step["collectives"].items()))
        sequences = f"{step['sequences_per_device']} x {step['length']}"
        sizes = (f"{step[key] / 2**30:.2f}" for key in ("state_bytes", "temporary_bytes"))
        flops = f"{step['flops_per_device'] / 1e12:.0f}"
        cells = (size, devices, sequences, str(step["micro_batches"]), *sizes, flops, collectives)
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", f"`{record['command']}`, {record['date']}, revision {record['revision']}, JAX {record['jax']}.", ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "deltanet", help="folder of the results")
    options = parser.parse_args()
    os.chdir(ROOT)
    # The choice of kernels looks at the devices that are there; here it is made for those that are not.
    for op in (delta_rule, short_convolution):
        op.IMPLEMENTATIONS["pallas_gpu"] = (lambda problem: None, op.IMPLEMENTATIONS["pallas_gpu"][1])
    record = {"command": f"python scripts/{Path(__file__).name}", **provenance(), "steps": {}}
    for (size, devices), accumulate in PROBLEMS.items():
        step = record["steps"][f"{size} on {devices}"] = compile_step(size, devices, accumulate)
        print(size, devices, step, flush=True)
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / "language_model_compiled.json").write_text(json.dumps(record, indent=1) + "\n")
    (options.results / "language_model_compiled.md").write_text(table(record))


if __name__ == "__main__":
    main()
