"""Blocks that more than one paper uses. The sequence mixer is an argument; no paper is known here."""
