"""The shape of a pico-edge GPT, checked once and carried by every artefact.

Knows nothing of torch, ONNX or files. Try: `GPTConfig(n_layer=4, n_head=4, n_embd=128).head_dim`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from pico_edge.errors import ArtefactError, UsageError

Gelu = Literal["tanh", "erf"]

# Far beyond what fits in one file, a protobuf message of at most 2 GiB.
MAX_DIMENSION = 1 << 24


@dataclass(frozen=True)
class GPTConfig:
    """Hyper-parameters of the model, GPT-2's by default.

    block_size and vocab_size are in tokens; n_embd is the width of the residual stream.
    gelu: "tanh" is GPT-2's form, "erf" that of nanoGPT's `nn.GELU()`; it travels with the weights.
    Raises UsageError (a ValueError) that names the field when a value cannot make a model.
    """

    block_size: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True
    gelu: Gelu = "tanh"

    def __post_init__(self) -> None:
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise UsageError(f"{name} is {value!r}: expected a whole number")
            if not 1 <= value <= MAX_DIMENSION:
                raise UsageError(f"{name} is {value}: expected 1 to {MAX_DIMENSION}")
        if isinstance(self.dropout, bool) or not isinstance(self.dropout, int | float):
            raise UsageError(f"dropout is {self.dropout!r}: expected a number from 0 to below 1")
        if not 0.0 <= self.dropout < 1.0:  # also refuses nan
            raise UsageError(f"dropout is {self.dropout}: expected 0 <= dropout < 1")
        if not isinstance(self.bias, bool):
            raise UsageError(f"bias is {self.bias!r}: expected true or false")
        if self.gelu not in ("tanh", "erf"):
            raise UsageError(f"gelu is {self.gelu!r}: expected 'tanh' or 'erf'")
        if self.n_embd % self.n_head:
            raise UsageError(
                f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}: "
                "every head gets n_embd / n_head channels"
            )
        # onnxruntime's GroupQueryAttention: "head_size must be a multiple of 8"
        if self.head_dim % 8:
            raise UsageError(
                f"n_embd {self.n_embd} over n_head {self.n_head} gives heads of {self.head_dim} "
                "channels: expected a multiple of 8; change n_embd or n_head"
            )
        if self.n_embd % 16:  # the smallest block of MatMulNBits is 16 and must divide n_embd
            raise UsageError(f"n_embd is {self.n_embd}: expected a multiple of 16")

    @property
    def head_dim(self) -> int:
        """Channels per attention head."""
        return self.n_embd // self.n_head

    @property
    def n_parameters(self) -> int:
        """Weights of the model, the tied table counted once."""
        C, biases = self.n_embd, int(self.bias)
        block = 12 * C * C + 9 * C * biases + 2 * C * (1 + biases)
        return C * (self.vocab_size + self.block_size) + self.n_layer * block + C * (1 + biases)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for checkpoints and JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: object) -> GPTConfig:
        """The inverse of `to_dict`. Raises ArtefactError for a missing, unknown or bad field."""
        if not isinstance(values, dict):
            raise ArtefactError(f"model config is a {type(values).__name__}: expected an object")
        names = {field.name for field in dataclasses.fields(cls)}
        if values.keys() != names:
            missing, unknown = sorted(names - values.keys()), sorted(values.keys() - names, key=str)
            raise ArtefactError(f"model config: missing fields {missing}, unknown fields {unknown}")
        try:
            return cls(**values)
        except ValueError as error:  # UsageError, or a whole number of too many digits to print
            raise ArtefactError(f"model config: {error}") from error
