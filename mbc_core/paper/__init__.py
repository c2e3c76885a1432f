"""The paper's model: amortization, vector quantization with reset, aggregation, prefix, KV-LoRA; trained end to end."""
