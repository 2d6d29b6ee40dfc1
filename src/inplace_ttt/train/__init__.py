"""Training: documents -> tokens -> packed rows -> a model, on Hugging Face's Trainer."""
