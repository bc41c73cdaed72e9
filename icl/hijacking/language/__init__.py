"""Context hijacking of language models: prompts, a GPT-2 that reads local checkpoints, scores, a corpus of facts."""
