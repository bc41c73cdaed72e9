"""Compiles the delta rule's TPU kernels for TPUs that are not here, and records what the compiler says of them.

  pip install "libtpu==0.0.48.*"      beside JAX 0.11.2; 130 MB
  python scripts/compile_delta_rule_tpu.py

Writes tpu_compiled.json and tpu_compiled.md into the results folder: device memory, operations and bytes of both
passes.
Nothing is run.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4"}

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.experimental import topologies  # noqa: E402

from deltanet.delta_rule import pallas_tpu  # noqa: E402
from training.provenance import provenance  # noqa: E402

TOPOLOGIES = ("v5e:2x2", "v6e:2x2")
# batch, time, heads, head size, dtype, with decay and packed sequences
PROBLEMS = (
    (8, 2048, 16, 128, "bfloat16", False),
    (8, 2048, 8, 256, "bfloat16", True),
    (8, 2048, 32, 64, "float32", True),
)


def compile_both(topology: str, problem: tuple) -> dict[str, Any]:
    """What the compiler says of both passes on the first device of a topology."""
    batch, time, heads, dim, dtype, full = problem
    device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    sharding = jax.sharding.SingleDeviceSharding(device)

    def shape(*sizes, dtype=dtype):
        return jax.ShapeDtypeStruct(sizes, jnp.dtype(dtype), sharding=sharding)

    tokens = (batch, time, heads)
    arguments = [shape(*tokens, dim) for _ in range(3)] + [shape(*tokens)]
    arguments += [shape(*tokens, dtype="float32"), shape(batch, time, dtype="float32")] if full else [None, None]
    state = shape(batch, heads, dim, dim, dtype="float32")

    def both(q, k, v, beta, g, starts, state, cotangents):
        def forward(*leaves):
            return pallas_tpu.pallas_delta_rule(*leaves[:5], starts, leaves[5], dim**-0.5, False)

        results, pull = jax.vjp(forward, q, k, v, beta, g, state)
        return results, pull(cotangents)

    compiled = jax.jit(both).lower(*arguments, state, (arguments[2], state)).compile()
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    sizes = (memory.argument_size_in_bytes, memory.output_size_in_bytes, memory.temp_size_in_bytes)
    return {
        "memory_bytes": sum(sizes),
        "temporary_bytes": sizes[2],
        "flops": cost["flops"],
        "accessed_bytes": cost["bytes accessed"],
    }


def table(record: dict[str, Any]) -> str:
    """The record as a Markdown page."""
    lines = [
        "# The delta rule's TPU kernels, compiled ahead of time",
        "",
        "Both passes; nothing was run. GFLOP and GB are what the compiler expects.",
        "",
        "| TPU | batch x time x heads x dim | GiB | of it temporary | GFLOP | GB |",
        "|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        name = f"{row['problem']} {row['dtype']}{', decay, packed' if row['full'] else ''}"
        sizes = f"{row['memory_bytes'] / 2**30:.2f} | {row['temporary_bytes'] / 2**30:.2f}"
        work = f"{row['flops'] / 1e9:.0f} | {row['accessed_bytes'] / 1e9:.2f}"
        lines.append(f"| {row['topology']} | {name} | {sizes} | {work} |")
    lines += ["", f"`python scripts/compile_delta_rule_tpu.py`, {record['date']}, revision {record['revision']}, "]
    lines += [f"JAX {record['jax']}, libtpu {record['libtpu']}.", ""]
    return "\n".join(lines)


def main() -> None:
    import importlib.metadata

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "deltanet", help="folder of the results")
    options = parser.parse_args()
    record = {**provenance(), "libtpu": importlib.metadata.version("libtpu"), "rows": []}
    for topology in TOPOLOGIES:
        for problem in PROBLEMS:
            *sizes, dtype, full = problem
            row = {"topology": topology, "problem": "x".join(map(str, sizes)), "dtype": dtype, "full": full}
            record["rows"].append(row | compile_both(topology, problem))
            print(record["rows"][-1], flush=True)
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / "tpu_compiled.json").write_text(json.dumps(record, indent=1) + "\n")
    (options.results / "tpu_compiled.md").write_text(table(record))


if __name__ == "__main__":
    main()
