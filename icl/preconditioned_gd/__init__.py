"""Ahn et al., Transformers learn to implement preconditioned gradient descent (arXiv:2306.00297)."""
