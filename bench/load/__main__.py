"""python -m sglang_misa.bench.load"""

from sglang_misa.bench.load.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
