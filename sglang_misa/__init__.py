"""sglang-misa: cheaper token selection for DeepSeek Sparse Attention, as a fork-free SGLang plugin."""

__version__ = "0.2.0"
