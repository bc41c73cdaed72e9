"""Synthetic benchmarks of the DeltaNet paper (arXiv:2406.06484, section 4.1): MQAR, MAD and RegBench."""
