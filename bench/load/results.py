"""`results.json`: everything that a report says, as data with a published schema (`results.schema.json`).

`python -m sglang_misa.bench.load.results` prints the schema.
"""

from __future__ import annotations

import argparse
import json
import sys

from pydantic import ConfigDict

from sglang_misa import __version__
from sglang_misa.bench.load.environment import Environment
from sglang_misa.bench.load.plan import Plan
from sglang_misa.bench.load.verdict import Outcome
from sglang_misa.outlet import kept_stdout

SCHEMA = 2  # raised when a field changes its meaning or goes


class Results(Outcome):
    """One run. Latencies in seconds, rates in units a second, shares from 0 to 1; a missing figure is unknown."""

    model_config = ConfigDict(frozen=True, title="Results of sglang-misa's load test")

    schema_version: int = SCHEMA
    version: str = __version__
    environment: Environment | None
    servers: dict[str, dict[str, str]]  # arm → what its server said of itself
    plan: Plan


def schema() -> str:
    """The JSON schema of `results.json`."""
    return json.dumps(Results.model_json_schema(mode="serialization"), indent=1) + "\n"


@kept_stdout()
def main() -> int:
    argparse.ArgumentParser(prog="python -m sglang_misa.bench.load.results", description=schema.__doc__).parse_args()
    print(schema(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
