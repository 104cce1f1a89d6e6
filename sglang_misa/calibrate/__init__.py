"""From index tensors of a model to a policy file: python -m sglang_misa.calibrate."""
