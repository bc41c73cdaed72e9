"""Linear transformers under context hijacking (Li et al. 2025, arXiv:2502.15609v1), and language models likewise."""
