"""The contract of `model.onnx`: metadata keys, format version, tensor names, sampling defaults.

What training, export and runtime agree on, and nothing else: no torch, no onnx, no files. The graph
is that of GroupQueryAttention over a cache of fixed capacity, updated in place. Shapes: B batch,
S new tokens, N rows of logits wanted, H n_head, K capacity of the cache, D head_dim, V vocab_size.

| input                       | type, shape             |                                         |
|-----------------------------|-------------------------|-----------------------------------------|
| `input_ids`                 | int64 (B, S)            | right-padded when lengths differ        |
| `position_ids`              | int64 (B, S)            |                                         |
| `seqlens_k`                 | int32 (B)               | valid length after this call, minus one |
| `total_seq_len`             | int32 ()                | longest valid length after this call    |
| `out_index`                 | int64 (N)               | rows of logits wanted, b * S + s        |
| `past_key_values.{i}.key`   | cache type (B, H, K, D) | the same memory as `present.{i}.key`    |
| `past_key_values.{i}.value` | cache type (B, H, K, D) | and as `present.{i}.value`              |

Outputs: `logits` (N, V) and `present.{i}.key`, `present.{i}.value` (B, H, K, D).

A file for the target `portable` has the inputs and outputs of Hugging Face's exports instead, P
tokens cached before the call: `input_ids` (B, S), `attention_mask` (B, P + S), `position_ids`
(B, S), all int64, and `past_key_values.{i}.*` (B, H, P, D), which may be empty; `logits` (B, S, V)
and `present.{i}.*` (B, H, P + S, D).
"""

from __future__ import annotations

from typing import Any

from pico_edge.config import GPTConfig

CHECKPOINT_MAGIC = b"PK\x03\x04"  # how ckpt.pt begins, a zip file, and no model.onnx
HELD_OUT_BYTES = 64 << 10  # of validation text at most, in a checkpoint
FORMAT_VERSION = 1  # of model.onnx; raised when an older pico-edge could misread a newer file

NARROW_BELOW = 512  # channels: the forms of an int8 file for the CPU differ from there on
SCALE_BLOCK = 128  # weights that share a scale, unless `fine_blocks` says fewer
# Weights, and so activations, that share a scale where the error of an int8 file comes from (BPE
# model of 4 x 256, KL x 1e-5 of 19.3 in all): what the head reads 7.8, what mlp.c_proj reads 4.9.
# Blocks of 16 and 32 there leave 9.2, and the likeliest token is fp32's at 99.1 % of the places
# instead of 98.7; the head's cost no time, mlp.c_proj's 5 % of a step, in blocks of 64 3 %.
FINE_HEAD_BLOCK = 16
# A large table would grow the file, by a fifth of itself: at most this share of all weights.
FINE_HEAD_SHARE = 0.1
FINE_MLP_BLOCK = 32
FINE_MLP_WIDTH = 256  # wider ones have blocks twice as long, and so stay within 3 % of 8-bit peers
# Of positions, read as they are. In blocks of 128 and 32 a BPE model of 4 x 256 has 98.98 and
# 99.05 % of fp32's likeliest tokens, with float32 positions 99.01; 3 kB more of 3.9 MB.
POSITION_BLOCK = 32
# A call of more tokens takes the other branch of a file that has two. Drafts and the token before
# them are at most 16, and go through the kernels of the steps, whose texts they must not change.
# At 12 x 768 int8 both take the same time for 16, and a short prompt need not load the other.
FEW_TOKENS = 32

KEY_PREFIX = "pico_edge."
FORMAT_VERSION_KEY = KEY_PREFIX + "format_version"
CONFIG_KEY = KEY_PREFIX + "config"
TOKENIZER_KEY = KEY_PREFIX + "tokenizer"
SAMPLING_KEY = KEY_PREFIX + "sampling"
# How to run it: {"target", "precision", "opset", "weights", "cache", "rows_are_independent",
# "across_cpus", "min_onnxruntime", "kernels", "few_tokens"}.
# few_tokens: of a file with two branches; calls of more take the other one; else None.
# rows_are_independent: whether a text depends, beyond rounding, on no row or call beside it.
# kernels: provider -> {"missing": nodes without a kernel there, "source": where that was read}.
EXPORT_KEY = KEY_PREFIX + "export"
PROVENANCE_KEY = KEY_PREFIX + "provenance"
PARITY_KEY = KEY_PREFIX + "parity"
KEYS = (
    FORMAT_VERSION_KEY,
    CONFIG_KEY,
    TOKENIZER_KEY,
    SAMPLING_KEY,
    EXPORT_KEY,
    PROVENANCE_KEY,
    PARITY_KEY,
)
# A table for n-gram drafts (`pico_edge.ngrams`); files without it have none.
NGRAMS_KEY = KEY_PREFIX + "ngrams"
OPTIONAL_KEYS = (NGRAMS_KEY,)
MAX_METADATA_BYTES = 16 << 20  # per value
# Weights in the blocks: with fewer a step takes less than 60 us, and guessing what follows 5 to 10.
MIN_DRAFTING_WEIGHTS = 2 << 20
MAX_NGRAMS_BYTES = 256 << 10

# Which execution provider of onnxruntime a file of each target is made for. `web` is made for
# onnxruntime's build for browsers, and `portable` for any runtime: here the CPU runs them.
TARGET_PROVIDERS = {
    "cpu": "cpu",
    "cuda": "cuda",
    "directml": "directml",
    "web": "cpu",
    "portable": "cpu",
}
# Whose files the experimental provider webgpu runs, if their cache is not int8. Those of `web` have
# nodes without a kernel there where they are quantized; float16, as of `cuda`, could not be tried.
WEBGPU_TARGETS = ("directml", "cpu")
PORTABLE = "portable"

INPUT_IDS = "input_ids"
POSITION_IDS = "position_ids"
SEQLENS_K = "seqlens_k"
TOTAL_SEQ_LEN = "total_seq_len"
OUT_INDEX = "out_index"
ATTENTION_MASK = "attention_mask"
LOGITS = "logits"


def past_names(n_layer: int) -> list[str]:
    """Names of the cache inputs in graph order: key and value of layer 0, of layer 1, ..."""
    return [f"past_key_values.{i}.{part}" for i in range(n_layer) for part in ("key", "value")]


def present_names(n_layer: int) -> list[str]:
    """Names of the cache outputs, in the order of `past_names`."""
    return [f"present.{i}.{part}" for i in range(n_layer) for part in ("key", "value")]


def input_names(n_layer: int) -> list[str]:
    """Every graph input, in graph order."""
    return [
        INPUT_IDS,
        POSITION_IDS,
        SEQLENS_K,
        TOTAL_SEQ_LEN,
        OUT_INDEX,
        *past_names(n_layer),
    ]


def portable_input_names(n_layer: int) -> list[str]:
    """Every input of a graph for the target `portable`, in graph order."""
    return [INPUT_IDS, ATTENTION_MASK, POSITION_IDS, *past_names(n_layer)]


def output_names(n_layer: int) -> list[str]:
    """Every graph output, in graph order."""
    return [LOGITS, *present_names(n_layer)]


def few_tokens(export: dict[str, Any]) -> int | None:
    """The value of that name in EXPORT_KEY; None for a file without branches."""
    value = export.get("few_tokens")
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def worth_drafting(config: GPTConfig) -> bool:
    """Whether a step is long enough for guessed tokens to pay: see MIN_DRAFTING_WEIGHTS."""
    return 12 * config.n_layer * config.n_embd**2 >= MIN_DRAFTING_WEIGHTS


def tokens_kept(block_size: int) -> int:
    """Tokens that stay when the window of a text is full: the newest third of it.

    They are read again at each refill, and the more there are the sooner the next one comes:
    NOTES.md has what that costs.
    """
    return max(1, block_size // 3)


# What `generate` does unless told otherwise; every file carries its own copy, made at export. What
# is missing there, in files of an older pico-edge, has the value it has here.
SAMPLING_DEFAULTS: dict[str, Any] = {
    "max_new_tokens": 200,
    "temperature": 0.8,
    "top_k": 50,
    "top_p": 1.0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "no_repeat_ngram_size": 0,
    "min_new_tokens": 0,
    "context_overflow": "slide",
}


def fine_blocks(config: GPTConfig) -> dict[str, int]:
    """Weights that share a scale in an int8 file, by module name, where not SCALE_BLOCK."""
    if config.n_embd >= NARROW_BELOW:
        return {}
    mlp_block = FINE_MLP_BLOCK if config.n_embd <= FINE_MLP_WIDTH else 2 * FINE_MLP_BLOCK
    fine = {f"transformer.h.{i}.mlp.c_proj": mlp_block for i in range(config.n_layer)}
    table = config.vocab_size * config.n_embd
    layers = 12 * config.n_embd**2 * config.n_layer
    if table <= FINE_HEAD_SHARE * (table + layers):
        fine["lm_head"] = FINE_HEAD_BLOCK
    return fine
