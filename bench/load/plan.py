"""A whole run as data: arms, cells and service limits. This is what `plan.json` holds."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from sglang_misa.bench.load.settings import (
    Access,
    Bounds,
    Lengths,
    Load,
    LoadError,
    Price,
    Protocol,
    Serving,
    Settings,
    Workload,
    problem_of,
)


class Arm(Settings):
    """One side: a URL, or the command that launches a server, and what token selection it claims to run."""

    name: str = Field(min_length=1)
    server: str = Field(min_length=1)
    expect: str | None = None

    @property
    def launched(self) -> bool:
        return not self.server.lower().startswith(("http://", "https://"))


class Cell(Settings):
    """One point of the grid: what is asked, and how."""

    workload: Workload
    load: Load

    @classmethod
    def of(cls, workload: Workload, load: Load) -> Cell:
        """With every default resolved."""
        load = load.resolved(workload)
        return cls(workload=workload.resolved(load), load=load)

    @property
    def level(self) -> str:
        """The load of this cell in words."""
        if self.load.arrival == "closed":
            return f"concurrency {self.load.concurrency}"
        if self.load.arrival == "trace":
            return f"its times × {self.workload.time_scale:g}"
        return f"{self.load.arrival} {self.load.rate:g}/s"

    @property
    def label(self) -> str:
        return f"{self.workload.label} · {self.level}"


class Limits(Settings):
    """Limits in seconds that a request must keep, all of them, to count as good."""

    ttft: float | None = Field(None, gt=0)
    tpot: float | None = Field(None, gt=0)
    itl_max: float | None = Field(None, gt=0)
    e2e: float | None = Field(None, gt=0)

    @property
    def limits(self) -> dict[str, float | None]:
        """Figure → its limit."""
        return {name: getattr(self, name) for name in Limits.model_fields}


class Slo(Limits):
    """The limits of every request, and others by context: `[contexts.128k]` holds for prompts of up to 128K tokens."""

    contexts: dict[str, Limits] = Field({})

    def of(self, prompt: int) -> dict[str, float | None]:
        """Limits of a prompt of so many tokens: those of the smallest context that holds it, over the general ones."""
        fitting = [(Lengths.parse(c).longest, limits) for c, limits in self.contexts.items()]
        held = min((pair for pair in fitting if pair[0] >= prompt), key=lambda pair: pair[0], default=None)
        return self.limits if held is None else self.limits | held[1].model_dump(exclude_none=True)

    @classmethod
    def read(cls, path: Path) -> Slo:
        """From a TOML or JSON file. Raises LoadError for a file that is not there or holds something else."""
        try:
            text = path.read_text(encoding="utf-8-sig")
            slo = cls.model_validate_json(text) if path.suffix == ".json" else cls.model_validate(tomllib.loads(text))
            slo.of(1)
            if not any(limit for one in (slo, *slo.contexts.values()) for limit in one.limits.values()):
                raise LoadError("no limit")
        except (OSError, ValueError, LoadError, RecursionError) as error:
            raise LoadError(
                f"slo: expected a TOML or JSON file with {', '.join(cls.model_fields)} in seconds, got {path} "
                f"({problem_of(error)}); correct it"
            ) from None
        return slo


class Search(Settings):
    """How the highest load inside the limits is looked for."""

    over: Annotated[
        Literal["concurrency", "rate"],
        Field(description="what grows: the clients of a closed loop, or an open loop's rate"),
    ] = "concurrency"
    start: Annotated[float, Field(gt=0, description="load to begin with")] = 1.0
    highest: Annotated[float, Field(gt=0, description="load not to go beyond")] = 256.0
    target: Annotated[float, Field(gt=0, lt=1, description="share of requests that must keep every limit")] = 0.95
    step_blocks: Annotated[
        int, Field(ge=1, description="blocks at most for one load; fewer where the share's interval decides sooner")
    ] = 3

    @model_validator(mode="after")
    def _check(self) -> Search:
        if self.start > self.highest:
            raise LoadError(f"start: expected at most --highest, got {self.start:g} and {self.highest:g}; change one")
        if self.over == "concurrency" and (self.start % 1 or self.highest % 1):
            raise LoadError(
                f"start: expected whole numbers of clients, got {self.start:g} to {self.highest:g}; give whole ones"
            )
        return self


class Plan(Settings):
    """A whole run: every arm in every cell, `blocks` times."""

    arms: tuple[Arm, ...]
    cells: tuple[Cell, ...]
    blocks: int = Field(1, ge=1)
    until_ci: float | None = Field(None, gt=0)
    max_blocks: int = Field(40, ge=1)
    mode: Literal["together", "alternate"] = "together"
    protocol: Protocol = Protocol()
    access: Access = Access()
    serving: Serving = Serving()
    bounds: Bounds = Bounds()
    price: Price = Price()
    slo: Slo | None = None
    search: Search | None = None
    fail_if: tuple[str, ...] = ()
    primary: str = "ttft_p50"
    confidence: float = Field(0.95, gt=0, lt=1)

    @property
    def most_blocks(self) -> int:
        """Blocks of a cell at most."""
        return self.blocks if self.until_ci is None else max(self.blocks, self.max_blocks)
