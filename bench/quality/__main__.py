"""python -m sglang_misa.bench.quality"""

from sglang_misa.bench.quality.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
