"""Trains what a config file describes.

  python train.py --config=configs/icl/preconditioned_gd/theorem3.py:scale=cpu --workdir=runs/theorem3
  python train.py --config=... --workdir=... --config.seeds="(0,1,2,3,4)" --config.optimizer.learning_rate=0.01

The same command resumes a run that was killed. --print_config shows every entry of the config and stops.
"""

from absl import flags

from training import cli
from training.durations import format_seconds

CONFIG = cli.define_training_flags()
WORKDIR = flags.DEFINE_string(
    "workdir", None, "folder of the run: config, metrics, checkpoints; resumed if it is there"
)
PRINT_CONFIG = flags.DEFINE_bool("print_config", False, "print the resolved config and stop")
flags.adopt_module_key_flags(cli)


def main() -> None:
    config = cli.required(CONFIG)
    if PRINT_CONFIG.value:
        print(config)
        return
    workdir = cli.required(WORKDIR)
    cli.start_distributed()
    from training.loop import train  # imports jax, which --help need not wait for
    from training.metrics import summary

    result = train(config, workdir)
    print(f"{workdir}: finished in {format_seconds(result.wall_seconds)}; {summary(result.metrics)}")


if __name__ == "__main__":
    cli.run(main)
