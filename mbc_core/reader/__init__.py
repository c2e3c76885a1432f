"""The language model, its KV-LoRA, the prompt and generation."""
