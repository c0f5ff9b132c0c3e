"""Files are there whole or not at all."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import IO

import pytest

from none_core.files import replace


@pytest.mark.parametrize("when", ["write", "replace"])
def test_a_crash_leaves_the_old_file_whole_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"old")

    def crash(*args: object) -> None:
        raise OSError("disk full")

    def half(stream: IO[bytes]) -> None:
        stream.write(b"half of it")
        if when == "write":
            crash()

    if when == "replace":
        monkeypatch.setattr("none_core.files.os.replace", crash)
    with pytest.raises(OSError, match="disk full"):
        replace(file, half)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert file.read_bytes() == b"old"


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"old")
    seen = []

    def slowly(stream: IO[bytes]) -> None:
        stream.write(b"first half")
        stream.flush()
        seen.append(file.read_bytes())
        stream.write(b", second half")

    replace(file, slowly)
    assert seen == [b"old"]
    assert file.read_bytes() == b"first half, second half"


@pytest.mark.parametrize("mode", [0o600, 0o644])
def test_a_file_has_its_permissions(tmp_path: Path, mode: int) -> None:
    replace(tmp_path / "file", lambda stream: stream.write(b"x"), mode=mode)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode
