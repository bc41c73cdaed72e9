"""DeltaNet (Yang et al., arXiv:2406.06484): linear transformers whose state is updated by the delta rule."""
