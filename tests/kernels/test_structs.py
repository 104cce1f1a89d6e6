"""What the host packs lies where the CUDA sources read it: both sides' structs, by a compiler."""

import ctypes
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from on_cpu import COMPILER, device_sources

from sglang_misa.kernels import structs
from sglang_misa.kernels.build import definitions

STRUCTS = [kind for kind in vars(structs).values() if isinstance(kind, type) and issubclass(kind, structs.Struct)][1:]

SHAPE = {"index_heads": 64, "columns": 8, "residual": True, "sketch_bits": 2}  # no struct depends on it


def assertions(kind: type[structs.Struct]) -> Iterator[str]:
    name = f"misa::{kind.__name__}"
    yield f"sizeof({name}) == {ctypes.sizeof(kind)}"
    for field, _ in kind._fields_:
        place = getattr(kind, field)
        yield f"offsetof({name}, {field}) == {place.offset}"
        yield f"sizeof({name}::{field}) == {place.size}"


SOURCES = sorted({source for kind in STRUCTS for source in kind.sources})


def complaints(folder: Path, source: str) -> str:
    """What the compiler says of the structs that a source reads."""
    device_sources(folder, source)
    lines = [f"static_assert({a});" for kind in STRUCTS if source in kind.sources for a in assertions(kind)]
    (folder / "layout.cpp").write_text("\n".join([f'#include "{source}.cu"', *lines]))
    flags = ["-std=c++20", "-fsyntax-only", "-w", f"-I{folder}", *definitions(SHAPE)]
    return subprocess.run(["g++", *flags, str(folder / "layout.cpp")], capture_output=True, text=True).stderr


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The complaints of every source, compiled side by side."""
    folders = [tmp_path_factory.mktemp(source) for source in SOURCES]
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(SOURCES, pool.map(complaints, folders, SOURCES), strict=True))


@COMPILER
@pytest.mark.parametrize("source", SOURCES)
def test_fields_lie_where_the_kernels_read_them(source, told):
    assert told[source] == ""


def test_every_field_is_given_by_name():
    tensor = torch.zeros(3)
    column = structs.ResidualColumn(query=tensor, scale=None)
    assert (column.query, column.scale) == (tensor.data_ptr(), None)
    with pytest.raises(TypeError, match=r"ResidualColumn: expected fields \['query', 'scale'\], got \['query'\]"):
        structs.ResidualColumn(query=tensor)
    with pytest.raises(TypeError, match="got"):
        structs.ResidualColumn(query=tensor, scale=None, other=1)
