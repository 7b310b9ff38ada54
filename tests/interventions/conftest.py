"""Makes the helpers beside these tests importable; what tests on micro-models share."""

import sys
import warnings
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import micro


@pytest.fixture(params=micro.FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def no_effect_is_expected():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield
