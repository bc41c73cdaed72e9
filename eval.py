"""Evaluates a checkpoint: all evaluators of the run's task. With a prompt, continues it instead.

  python eval.py --workdir=runs/theorem3              the newest checkpoint
  python eval.py --workdir=runs/theorem3 --step=15000
  python eval.py --workdir=runs/books --prompt="It was" --tokens=100 --temperature=0.8 --top_k=50 --seed=3

Prints one JSON object, evaluator/metric -> value (a list over replicas where there are several); or the prompt and its
continuation by the run's language model (of the first replica).
"""

import json

from absl import flags

from training import cli
from training.errors import UserError

WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run")
STEP = flags.DEFINE_integer("step", None, "the checkpoint's step; the newest if it is not given")
PROMPT = flags.DEFINE_string("prompt", None, "text to continue")
TOKENS = flags.DEFINE_integer("tokens", 64, "how many tokens to add to the prompt")
TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "0 takes the likeliest token each time")
TOP_K = flags.DEFINE_integer("top_k", None, "draw from so many likeliest tokens only")
SEED = flags.DEFINE_integer("seed", 0, "of the draws")


def main() -> None:
    workdir = cli.required(WORKDIR)
    if PROMPT.value is not None:
        print(_continued(workdir, PROMPT.value))
        return
    from training.loop import evaluate  # imports jax, which --help need not wait for

    print(json.dumps(evaluate(workdir, STEP.value), indent=2))


def _continued(workdir: str, prompt: str) -> str:
    import jax
    import numpy as np

    from models.sampling import generate
    from training.loop import load

    task, models = load(workdir, STEP.value)
    tokenizer = getattr(task, "tokenizer", None)
    if tokenizer is None:
        raise UserError(f"--prompt: the run in {workdir} is no language model of text: its task has no tokenizer")
    added = generate(
        models[0],
        np.array([tokenizer.encode(prompt)], np.int32).reshape(1, -1),
        tokens=TOKENS.value,
        key=jax.random.key(SEED.value),
        temperature=TEMPERATURE.value,
        top_k=TOP_K.value,
    )
    return prompt + tokenizer.decode(np.asarray(added[0]).tolist())


if __name__ == "__main__":
    cli.run(main)
