"""HTTP load at 32K–128K contexts against SGLang or OpenAI-compatible servers, and the fairest A/B of two of them.

Run it with `python -m sglang_misa.bench.load --help`. It needs the `bench` extra, and neither torch nor SGLang.
"""
