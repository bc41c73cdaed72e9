"""In-context learning with linear transformers: data, layers, baselines, and one package per paper."""
