import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def data():
    """A public data set by its path in the shared folder; the test is skipped where it is not there."""
    root = Path(os.environ.get("VERIDICAL_TEST_DATA") or Path(__file__).parents[3] / "shared" / "data")

    def find(name):
        path = root / name
        if not path.exists():
            pytest.skip(f"no {name} in the folder of public data (set VERIDICAL_TEST_DATA)")
        return path

    return find
