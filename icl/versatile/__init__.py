"""Noisy in-context regression with unknown noise levels (Vladymyrov et al. 2024, arXiv:2402.14180)."""
