"""The kernels of `pallas_gpu`: the parts that they share, and the two-sided form."""
