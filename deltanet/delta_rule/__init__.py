"""The delta rule as an operation. It needs nothing but JAX; DERIVATION.md has the mathematics."""

from deltanet.delta_rule.api import delta_rule, delta_rule_step

__all__ = ["delta_rule", "delta_rule_step"]
