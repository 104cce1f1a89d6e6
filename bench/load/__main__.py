"""python -m sglang_misa.bench.load"""

import sys

if __name__ == "__main__":
    try:
        from sglang_misa.bench.load.cli import main
    except ModuleNotFoundError as error:
        print(f"bench.load: expected the extra bench, got no {error.name}; install sglang-misa[bench]", file=sys.stderr)
        raise SystemExit(2) from None
    raise SystemExit(main())
