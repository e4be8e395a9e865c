"""Which checkpoint a rewind takes, and what no rank may find out alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from distclip import ConfigurationError, RewindRequested
from distclip.integrations.checkpoints import FILE
from distclip.integrations.rewinding import Checkpoints


@pytest.mark.ranks(1, 2)
def test_a_damaged_checkpoint_ends_every_rank(tmp_path: Path) -> None:
    (tmp_path / "3").mkdir(exist_ok=True)
    (tmp_path / "3" / FILE).write_bytes(b"torn")
    with pytest.raises(ConfigurationError, match=r"distclip\.pt is damaged .* remove that"):
        Checkpoints(tmp_path).before(RewindRequested("back", 3, ()))
