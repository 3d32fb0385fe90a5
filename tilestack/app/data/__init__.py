"""Text to batches: documents, tokenizer, packing."""
