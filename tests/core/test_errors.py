"""The exit codes that the command line promises."""

import pytest

from pico_edge.errors import ArtefactError, DivergedError, PicoEdgeError, UsageError


@pytest.mark.parametrize(
    ("error", "exit_code"),
    [(PicoEdgeError, 1), (UsageError, 2), (ArtefactError, 3), (DivergedError, 4)],
)
def test_each_error_carries_its_exit_code(error: type[PicoEdgeError], exit_code: int) -> None:
    assert error.exit_code == exit_code
    with pytest.raises(PicoEdgeError):
        raise error("found, expected, what to do")


def test_a_usage_error_is_a_value_error_and_a_refused_file_is_not() -> None:
    assert issubclass(UsageError, ValueError)
    assert not issubclass(ArtefactError, ValueError)
