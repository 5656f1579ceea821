"""Whether the inputs and outputs of a graph are those that the session binds (`artefact`).

Pure functions of what `preflight` has read. Knows nothing of files.
Try: `contract_error(config, inputs, outputs, portable=False)` -> None, or what differs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from pico_edge import artefact
from pico_edge.config import GPTConfig

CACHE_TYPES = ("float32", "float16", "int8")
LOGITS_TYPES = ("float32", "float16")


@dataclass(frozen=True)
class ValueInfo:
    """A graph input or output.

    elem_type: as "float32", "?" if not said.
    shape: sizes, names of free axes, "?" for an axis without either; ("...",) if no rank is said.
    """

    name: str
    elem_type: str
    shape: tuple[int | str, ...]


def contract_error(
    config: GPTConfig, inputs: list[ValueInfo], outputs: list[ValueInfo], *, portable: bool
) -> str | None:
    """How inputs and outputs differ from those of `artefact` for this config; None if they do not.

    portable: the contract of the target `portable`.
    """
    n_layer = config.n_layer
    tokens = _Expected(("int64",), ("B", "S"))
    if portable:
        first = {
            artefact.INPUT_IDS: tokens,
            artefact.ATTENTION_MASK: _Expected(("int64",), ("B", "T")),
            artefact.POSITION_IDS: tokens,
        }
        logits_shape: tuple[int | str, ...] = ("B", "S", config.vocab_size)
    else:
        first = {
            artefact.INPUT_IDS: tokens,
            artefact.POSITION_IDS: tokens,
            artefact.SEQLENS_K: _Expected(("int32",), ("B",)),
            artefact.TOTAL_SEQ_LEN: _Expected(("int32",), ()),
            artefact.OUT_INDEX: _Expected(("int64",), ("N",)),
        }
        logits_shape = ("N", config.vocab_size)
    n_inputs = len(first) + 2 * n_layer
    if len(inputs) != n_inputs or len(outputs) != 1 + 2 * n_layer:
        return (
            f"{len(inputs)} inputs and {len(outputs)} outputs: expected {n_inputs} "
            f"and {1 + 2 * n_layer} for the {n_layer} layers in its metadata"
        )
    pasts, presents = artefact.past_names(n_layer), artefact.present_names(n_layer)
    cache_shape = ("B", config.n_head, "K", config.head_dim)
    past_set = frozenset(pasts)
    found_types = {value.elem_type for value in inputs if value.name in past_set}
    # One type for all of them: mixed ones are listed as differences from the first choice.
    cache_types = tuple(found_types) if len(found_types) == 1 else CACHE_TYPES[:1]
    cache_types = tuple(name for name in cache_types if name in CACHE_TYPES) or CACHE_TYPES
    cache = _Expected(cache_types, cache_shape)
    differences = _differences(
        "input",
        {**first, **dict.fromkeys(pasts, cache)},
        inputs,
    ) + _differences(
        "output",
        {
            artefact.LOGITS: _Expected(LOGITS_TYPES, logits_shape),
            **dict.fromkeys(presents, cache),
        },
        outputs,
    )
    if not differences:
        return None
    more = f"; and {len(differences) - 8} more" if len(differences) > 8 else ""
    return f"the graph differs from its metadata: {'; '.join(differences[:8])}{more}"


class _Expected(NamedTuple):
    """Allowed element types; sizes, and names for axes that must be free."""

    elem_types: tuple[str, ...]
    shape: tuple[int | str, ...]


def _differences(kind: str, expected: dict[str, _Expected], values: list[ValueInfo]) -> list[str]:
    found = {value.name: value for value in values}
    differences = [
        f"{kind} {name[:80]!r} found, none expected" for name in found if name not in expected
    ]
    for name, want in expected.items():
        wanted = f"{' or '.join(want.elem_types)} {_shape_text(want.shape)}"
        value = found.get(name)
        if value is None:
            differences.append(f"{kind} {name} missing, expected {wanted}")
        elif value.elem_type not in want.elem_types or not _fits(value.shape, want.shape):
            actual = f"{value.elem_type} {_shape_text(value.shape)}"
            differences.append(f"{kind} {name} expected {wanted}, found {actual}")
    return differences


def _fits(shape: tuple[int | str, ...], expected: tuple[int | str, ...]) -> bool:
    return len(shape) == len(expected) and all(
        isinstance(axis, str) if isinstance(want, str) else axis == want
        for axis, want in zip(shape, expected, strict=True)
    )


def _shape_text(shape: tuple[int | str, ...]) -> str:
    """Example: ("B", 2, "K", 16) -> "(B, 2, K, 16)"."""
    return f"({', '.join(str(axis)[:40] for axis in shape)})"
