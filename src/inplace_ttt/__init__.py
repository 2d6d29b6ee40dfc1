"""In-Place Test-Time Training for Hugging Face causal language models."""
