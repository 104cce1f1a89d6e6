"""Artefacts of a run in one folder, written whole or not at all: units are what `resume` skips and `compare` reads."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from collections.abc import Iterable
from pathlib import Path

from pydantic import ValidationError

from sglang_misa.bench.load.runner import Unit
from sglang_misa.bench.load.safety import Keys
from sglang_misa.bench.load.settings import Arm, Cell, Connection, LoadError, Plan

MAX_UNIT = 512 * 1024 * 1024  # bytes of a stored unit that are read at most
DERIVED = ("ttft", "tpot", "e2e")
REQUEST_COLUMNS = (
    *(
        "pair",
        "turn",
        "due",
        "dispatched",
        *DERIVED,
        "prompt_wanted",
        "prompt_tokens",
        "output_wanted",
        "output_tokens",
    ),
    *("cached_wanted", "cached_tokens", "queue_s", "prefill_s", "needle_depth", "needle_right", "error"),
)


class Store:
    """`plan.json`, `units/*.json`, and what is derived from them."""

    def __init__(self, folder: Path, keys: Keys):
        self.folder = folder
        self._keys = keys
        (folder / "units").mkdir(parents=True, exist_ok=True)

    def write(self, name: str, content: str | bytes) -> Path:
        """Write one artefact atomically, without keys. Returns its path."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        data = content if isinstance(content, bytes) else self._keys.erase(content).encode()
        partial = path.with_name(path.name + ".part")
        partial.write_bytes(data)
        os.replace(partial, path)
        return path

    def save_plan(self, plan: Plan) -> None:
        self.write("plan.json", json.dumps(self._keys.clean(plan.model_dump()), indent=1))

    def load_plan(self) -> Plan:
        """The stored plan. Raises LoadError when there is none."""
        try:
            return Plan.model_validate_json((self.folder / "plan.json").read_bytes())
        except (OSError, ValidationError) as error:
            raise LoadError(f"{self.folder}: expected the folder of a run with a plan.json, got {error}") from None

    def save(self, unit: Unit, arm: Arm, cell: Cell, connection: Connection) -> None:
        self.write(self._name(arm, cell, unit.block, connection), json.dumps(self._keys.clean(unit.model_dump())))

    def find(self, arm: Arm, cell: Cell, block: int, connection: Connection) -> Unit | None:
        """The unit measured earlier for exactly this arm, cell and block; None when there is none or it was invalid."""
        path = self.folder / self._name(arm, cell, block, connection)
        if not path.exists() or path.stat().st_size > MAX_UNIT:
            return None
        try:
            unit = Unit.model_validate_json(path.read_bytes())
        except ValidationError:
            return None
        return None if unit.problems else unit

    def units(self) -> list[Unit]:
        """Every stored unit, in the order of measurement."""
        files = sorted((self.folder / "units").glob("*.json"))
        return sorted((Unit.model_validate_json(f.read_bytes()) for f in files), key=lambda u: u.started)

    def _name(self, arm: Arm, cell: Cell, block: int, connection: Connection) -> str:
        what = f"{arm.digest()}{cell.digest()}{block}{connection.api}{connection.openai_extras}"
        return f"units/{hashlib.sha256(what.encode()).hexdigest()[:16]}.json"


def units_csv(units: Iterable[Unit]) -> str:
    """One row for each unit, one column for each figure."""
    rows = [
        {"arm": u.arm, "cell": u.label, "block": u.block, "valid": not u.problems, **u.figures, **u.client, **u.gpu}
        for u in units
    ]
    return _csv(rows, list(dict.fromkeys(key for row in rows for key in row)))


def requests_csv(units: Iterable[Unit]) -> str:
    """One row for each measured request, without its prompt."""
    rows = [
        {"arm": u.arm, "cell": u.label, "block": u.block}
        | {c: getattr(r, c) if r.good or c not in DERIVED else None for c in REQUEST_COLUMNS}
        for u in units
        for r in u.records
    ]
    return _csv(rows, ["arm", "cell", "block", *REQUEST_COLUMNS])


def _csv(rows: list[dict[str, object]], columns: list[str]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
