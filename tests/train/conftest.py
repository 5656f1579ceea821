"""The training tests need torch; without it (the base install) they are skipped as a whole."""

import pytest

torch = pytest.importorskip("torch")
torch.set_num_threads(1)
