"""PyTorch networks as training and export find them: what is around them, and which layers can be quantized."""
