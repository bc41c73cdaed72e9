"""LION: bidirectional linear attention, its layers and vision transformers (Afzal et al. 2025, arXiv:2502.16249)."""
