"""Table 1 and the ablations of the DeltaNet paper in miniature: small language models on classic books."""
