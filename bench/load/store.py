"""The folder of a run, with atomically written artefacts: `resume` skips its units and `compare` reads them."""

from __future__ import annotations

import csv
import fcntl
import hashlib
import io
import os
from collections.abc import Iterable
from pathlib import Path

from pydantic import ValidationError

from sglang_misa.bench.load.environment import Environment
from sglang_misa.bench.load.plan import Arm, Cell, Plan
from sglang_misa.bench.load.records import Unit
from sglang_misa.bench.load.safety import Keys
from sglang_misa.bench.load.settings import LoadError, Protocol, problem_of
from sglang_misa.validation import Model

MAX_UNIT = 512 * 1024 * 1024  # bytes of a stored unit that are read at most
RESUME = "`resume`"
LOCK = ".lock"  # held by the run that writes
BEGINNING = ("plan.json", "environment.json", LOCK)  # written before any server is asked
DERIVED = ("ttft", "tpot", "e2e")
REQUEST_COLUMNS = (
    *("pair", "turn", "due", "dispatched", *DERIVED),
    *("prompt_wanted", "prompt_tokens", "output_wanted", "output_tokens"),
    *("cached_wanted", "cached_tokens", "queue_s", "prefill_s", "needle_depth", "needle_right", "error"),
)


class Store:
    """`plan.json`, `units/*.json`, and what is derived from them. go_on: how its user goes on with what is kept."""

    def __init__(self, folder: Path, keys: Keys, go_on: str = RESUME):
        self.folder = folder
        self._keys, self._go_on = keys, go_on
        self._made = not folder.exists()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LoadError(
                f"out: expected a folder that can be made, got {folder} ({error.strerror}); change --out"
            ) from None

    def __enter__(self) -> Store:
        """Keep others out until the run ends. Raises LoadError where one is at work."""
        try:
            self._lock = (self.folder / LOCK).open("w")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LoadError(
                f"out: expected a folder that no other run writes to, got {self.folder}; name another"
            ) from None
        except OSError as error:
            raise LoadError(
                f"out: expected a folder that can be written to, got {self.folder} ({error.strerror}); change --out"
            ) from None
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Remove a folder that was made for nothing: after a LoadError, where it holds no unit, answer or log."""
        if (
            kind is not None
            and issubclass(kind, LoadError)
            and self._made
            and {path.name for path in self.folder.iterdir()} <= {*BEGINNING}
        ):
            for name in BEGINNING:
                (self.folder / name).unlink(missing_ok=True)
            self.folder.rmdir()
        self._lock.close()

    def write(self, name: str, content: str | bytes) -> Path:
        """Write one artefact atomically; keys are erased from values before they come here. Raises LoadError."""
        path = self.folder / name
        partial = path.with_name(path.name + ".part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(content if isinstance(content, bytes) else content.encode())
            os.replace(partial, path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise LoadError(
                f"{path}: expected a file with room to write, got {error.strerror}; what was measured is kept: make "
                f"room there and {self._go_on}"
            ) from None
        return path

    def begin(self, plan: Plan, environment: Environment) -> None:
        """Keep a run's plan, and where it began: one that goes on with the stored plan keeps what is there."""
        arms = tuple(a.model_copy(update={"server": self._keys.erase(a.server)}) for a in plan.arms)
        erased = plan.model_copy(update={"arms": arms})
        if self.environment() is None or not self._goes_on(erased):
            self.save_environment(environment)
        self.write("plan.json", erased.model_dump_json(indent=1))

    def _goes_on(self, plan: Plan) -> bool:
        try:
            return self.plan_in(self.folder) == plan
        except LoadError:
            return False

    def save_environment(self, environment: Environment) -> None:
        self.write("environment.json", environment.model_dump_json(indent=1))

    def environment(self) -> Environment | None:
        """Where the run began; None where that was not kept."""
        try:
            return Environment.model_validate_json((self.folder / "environment.json").read_bytes())
        except (OSError, ValidationError):
            return None

    @staticmethod
    def plan_in(folder: Path) -> Plan:
        """The plan stored in `folder`. Raises LoadError when there is none that can be used."""
        return _read(folder / "plan.json", Plan, "the plan of a run", "mend it, or name a run's folder")

    def save(self, unit: Unit, arm: Arm, cell: Cell, protocol: Protocol) -> None:
        self.write(self._name(arm, cell, unit.block, protocol), unit.model_dump_json())

    def find(self, arm: Arm, cell: Cell, block: int, protocol: Protocol) -> Unit | None:
        """The unit measured earlier for exactly this arm, cell and block; None when there is none or it was invalid."""
        path = self.folder / self._name(arm, cell, block, protocol)
        try:
            if path.stat().st_size > MAX_UNIT:
                return None
            unit = Unit.model_validate_json(path.read_bytes())
        except (OSError, ValidationError):
            return None
        return None if unit.problems else unit

    def units(self) -> list[Unit]:
        """Every stored unit, in the order of measurement. Raises LoadError."""
        paths = sorted((self.folder / "units").glob("*.json"))
        found = [_read(path, Unit, "a unit", f"remove it, and {self._go_on}") for path in paths]
        return sorted(found, key=lambda u: u.started)

    def _name(self, arm: Arm, cell: Cell, block: int, protocol: Protocol) -> str:
        what = f"{arm.digest()}{cell.digest()}{block}{protocol.api}{protocol.openai_extras}"
        return f"units/{hashlib.sha256(what.encode()).hexdigest()[:16]}.json"


def _read(path: Path, model: type[Model], wanted: str, way_out: str) -> Model:
    """What is stored at `path`. Raises LoadError."""
    try:
        return model.model_validate_json(path.read_bytes())
    except OSError as error:
        raise LoadError(f"{path}: expected {wanted}, got {error.strerror}; {way_out}") from None
    except (ValidationError, LoadError) as error:
        raise LoadError(f"{path}: {problem_of(error, way_out)}") from None


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
