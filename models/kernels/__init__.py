"""What the kernels of several ops share; needs nothing but jax."""
