"""Training: documents -> tokens -> packed rows -> a model, on Hugging Face's Trainer."""

SMALLEST_VOCABULARY = 257
"""Of a byte-level BPE: every byte and the end of text."""
