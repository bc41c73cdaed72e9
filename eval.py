"""Evaluates a checkpoint: all evaluators of the run's task.

  python eval.py --workdir=runs/theorem3              the newest checkpoint
  python eval.py --workdir=runs/theorem3 --step=15000

Prints one JSON object, evaluator/metric -> value (a list over replicas where there are several).
"""

import json

from absl import flags

from training import cli

WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run")
STEP = flags.DEFINE_integer("step", None, "the checkpoint's step; the newest if it is not given")


def main() -> None:
    workdir = cli.required(WORKDIR)
    from training.loop import evaluate  # imports jax, which --help need not wait for

    print(json.dumps(evaluate(workdir, STEP.value), indent=2))


if __name__ == "__main__":
    cli.run(main)
