"""A small model of DeepSeek-V3.2's architecture, trained to answer needles, in the format that SGLang serves."""
