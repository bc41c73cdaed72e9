"""The kernels of `pallas_gpu`: tiles, registers and barriers. `DERIVATION.md` has the mathematics and their design."""
