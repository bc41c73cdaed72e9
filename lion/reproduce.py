"""The tables and figures of "Linear Attention for Efficient Bidirectional Sequence Modeling" (arXiv:2502.16249)."""

from lion.ablation_table import EUROSAT, FASHION_MNIST
from lion.benchmark_tables import CHUNK_SIZES, INFERENCE, TRAINING_RESOLUTIONS, TRAINING_SPEED
from lion.stability import STABILITY

ENTRIES = {
    "ablations/eurosat": EUROSAT,
    "ablations/fashion_mnist": FASHION_MNIST,
    "stability": STABILITY,
    "training_speed": TRAINING_SPEED,
    "training_resolutions": TRAINING_RESOLUTIONS,
    "inference": INFERENCE,
    "chunk_sizes": CHUNK_SIZES,
}
