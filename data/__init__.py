"""Data sources that more than one experiment uses."""
