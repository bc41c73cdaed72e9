"""What language models are measured by: losses of held-out texts, and zero-shot tests."""
