"""Errors with the exit code the command line gives them (0 done, 128+n stopped by signal n).

A message is one line: what was found, what was expected, what to do.
"""

from __future__ import annotations


class PicoEdgeError(Exception):
    """The work failed while running: a provider is missing, a parity or quality limit is missed."""

    exit_code = 1


class UsageError(PicoEdgeError, ValueError):
    """An argument cannot be used: a value out of range, an output path that cannot be written."""

    exit_code = 2


class ArtefactError(PicoEdgeError):
    """An input file is refused: missing, empty, corrupt, of the wrong kind, too new, too short."""

    exit_code = 3


class DivergedError(PicoEdgeError):
    """Training reached a loss or gradient norm that is not finite."""

    exit_code = 4
