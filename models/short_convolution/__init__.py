"""The short convolution as an operation, with the SiLU and the norms that follow. It needs nothing but JAX."""

from models.short_convolution.api import Part, short_convolution
from models.short_convolution.xla import finish

__all__ = ["Part", "finish", "short_convolution"]
