"""Fixtures that all tests share."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of reference outputs of the authors' code; users do not have it."""
    folder = Path(os.environ.get("STARNET_GOLDEN", ROOT / ".." / "shared" / "golden"))
    if not folder.is_dir():
        pytest.skip("no golden data: set STARNET_GOLDEN to their folder")
    return folder.resolve()
