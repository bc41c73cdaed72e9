"""Shared by the experiments of "Transformers learn to implement preconditioned gradient descent" (arXiv:2306.00297)."""

from ml_collections import ConfigDict

from training.config import base_config

SCALES = ("cpu", "gpu", "paper")


def regression_config(
    *, layers: int, project: bool, learning_rate: float, b1: float, b2: float, halve_every: str = "", clip: float = 0.0
) -> ConfigDict:
    """In-context regression with a structured linear transformer and Adam, as the authors' code trains it.

    Args:
      layers: L.
      project: eq. (11), with trained B; otherwise eq. (8).
      learning_rate: at the start.
      b1: of Adam.
      b2: of Adam. The authors found that 0.999 is far too slow.
      halve_every: interval at which the learning rate is halved; empty for a constant rate.
      clip: Frobenius norm to which the gradient of each matrix is clipped; 0 for none.
    """
    config = base_config()
    config.task = ConfigDict(
        {
            "name": "icl.preconditioned_gd.task.InContextRegression",
            "examples": 20,
            "variances": (1.0, 1.0, 0.25, 0.0625, 1.0),
            "rotated": True,
            "covariates": "normal",
            "gamma_shape": 2.5,
            "task_prior": "inverse_covariance",
            "resample_every": 100,
            "test_prompts": 20_000,
        }
    )
    config.model = ConfigDict(
        {
            "name": "icl.models.SparseLinearTransformer",
            "layers": layers,
            "heads": 1,
            "project": project,
            "init_std": 1e-4,
        }
    )
    config.optimizer.learning_rate = learning_rate
    config.optimizer.options = ConfigDict({"b1": b1, "b2": b2})
    if halve_every:
        config.optimizer.schedule, config.optimizer.halve_every = "halving", halve_every
    if clip:
        config.optimizer.clip, config.optimizer.clip_threshold = "matrix_norm", clip
    config.seeds = (0, 1, 2, 3, 4)
    config.batch_size = 20_000
    config.log_every = config.eval_every = "100 steps"
    config.checkpoint_every = "10%"
    return config
