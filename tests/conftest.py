"""What all tests share."""

import os

# The interpreter of GPU kernels runs every warpgroup of a block as a program of its own, and these wait for each other.
# On few cores the CPU's runtime has too few threads for them, unless this variable says otherwise.
os.environ.setdefault("NPROC", "8")
