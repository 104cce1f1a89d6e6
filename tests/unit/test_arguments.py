"""Words of command lines that are judged before any work is done."""

import argparse
import sys

import pytest

from sglang_misa import arguments


@pytest.mark.parametrize("word", ["0", "-1", "x", "1.5", ""])
def test_a_number_that_is_too_small_or_none(word):
    with pytest.raises(argparse.ArgumentTypeError, match="expected a whole number of 1 or more, got"):
        arguments.at_least(1)(word)
    assert arguments.at_least(0)("0") == 0


def test_a_file_can_be_written_and_stays_as_it_is(tmp_path):
    old, new = tmp_path / "old.csv", tmp_path / "new.csv"
    old.write_text("kept")
    assert [arguments.file_to_write(str(each)) for each in (old, new)] == [old, new]
    assert old.read_text() == "kept"
    assert not new.exists()
    for wrong in (
        tmp_path,
        tmp_path / "none" / "new.csv",
        "~no-such-user/new.csv",
        tmp_path / ("n" * 256),
        "",
        "/proc/new",
    ):
        with pytest.raises(argparse.ArgumentTypeError, match="expected a file that can be written, got"):
            arguments.file_to_write(str(wrong))


def test_a_picture_has_an_ending_that_can_be_drawn(tmp_path, monkeypatch):
    for right in ("new.png", "new.SVG", "new.pdf"):
        assert arguments.picture(str(tmp_path / right)) == tmp_path / right
    for wrong in ("new.txt", "new", "png"):
        with pytest.raises(argparse.ArgumentTypeError, match=r"expected a file that ends in \.png, \.svg, \.pdf, got"):
            arguments.picture(str(tmp_path / wrong))
    with pytest.raises(argparse.ArgumentTypeError, match="expected a file that can be written"):
        arguments.picture(str(tmp_path / "none" / "new.png"))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match="matplotlib"):
        arguments.picture(str(tmp_path / "new.png"))


@pytest.mark.parametrize("word", ["tpu", "cuda:x", "cuda:99", "cpu:0", ""])
def test_a_device_is_one_of_this_machine(word):
    with pytest.raises(argparse.ArgumentTypeError, match="expected cpu, or cuda"):
        arguments.device(word)
    assert arguments.device("cpu") == "cpu"
