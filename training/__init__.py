"""The one training loop: configs, optimisers, checkpoints, metrics and sharding. It knows no paper."""
