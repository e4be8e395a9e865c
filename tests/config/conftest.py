"""Fixtures of several files."""

from pathlib import Path

import pytest

from tests.config.writing import Write


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(text: str, name: str = "p.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write
