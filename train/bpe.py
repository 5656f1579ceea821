"""Which tokenizer a text gets, and byte-pair encoding trained on it.

A trained tokenizer is kept in the run folder, so that a second start has it at once. Knows nothing
of how tokens are stored.

Try: `train_bpe(["some text, some more text"], 300)`.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pico_edge.errors import ArtefactError, PicoEdgeError, UsageError
from pico_edge.publish import publish, remove_stale
from pico_edge.tokenizer import (
    BPETokenizer,
    SimpleTokenizer,
    Tokenizer,
    parse_ranks,
    pieces,
    tokenizer_from_dict,
)
from pico_edge.train.report import Reporter, count
from pico_edge.train.settings import choose_preset
from pico_edge.train.text import Piece, fingerprint, read_documents, text_bytes, utf8_bytes
from pico_edge.train.throughput import Throughput

# The trainer looks at this much text, spread over all of it. Bytes per token on 88 MB of source
# code and prose, vocabulary 8192: 3.44 from 8 MB (3.5 s), 3.46 from 16 MB (6 s), 3.48 from 32 MB
# (15 s).
SAMPLE_BYTES = 16_000_000
# And at this much of different words, which is what its memory (up to 120 bytes for each byte of
# them) and time follow: 3 MB of words that all differ take 360 MB.
DISTINCT_BYTES = 3_000_000
# A "word" of the BPE trainer is at most this long: text without spaces would be one, and each merge
# walks the words that it is in.
_BPE_WORD_CHARACTERS = 4096
CACHE_VERSION = 2  # of bpe.json: raised when the same text gives another tokenizer


# Vocabulary of a BPE by the preset for the text: a token should be seen a hundred times or more.
BPE_SIZES = {"nano": 512, "micro": 1024, "mini": 4096, "small": 16384}


def default_tokenizer(n_bytes: int) -> tuple[str, int]:
    """Kind and vocabulary size for a text of n_bytes. Example: 1_000_000 -> ("simple", 257)."""
    preset = choose_preset(n_bytes)
    if preset in ("nano", "micro"):
        return "simple", SimpleTokenizer.n_vocab
    return "bpe", BPE_SIZES[preset]


def choose_tokenizer(
    kind: str,
    files: Sequence[Path],
    *,
    vocab_size: int | None = None,
    ranks: str | os.PathLike[str] | None = None,
    encoding: str | None = None,
    text_field: str = "text",
    val_fraction: float = 0.1,
    folder: str | os.PathLike[str] | None = None,
    reporter: Reporter | None = None,
) -> Tokenizer:
    """The tokenizer of a kind: "simple", "bpe" (trained on the files but for their tail), "gpt2".

    vocab_size: for bpe, `<|endoftext|>` counted; None takes the one for the size of the text.
    ranks: for gpt2, a file instead of tiktoken's download. val_fraction: of the text, held out at
    its end and so not trained on here either; 0 where the validation text is another file. folder:
    where a trained one is kept (`bpe.json`) and found again while nothing changes; None: nowhere.
    """
    if kind == "simple":
        return SimpleTokenizer()
    if kind == "gpt2":
        return _gpt2_tokenizer(ranks)
    if kind != "bpe":
        raise UsageError(f"tokenizer {kind!r}: expected simple, bpe or gpt2")
    reporter = Reporter(quiet=True) if reporter is None else reporter
    n_bytes = text_bytes(files)
    if vocab_size is None:
        vocab_size = BPE_SIZES[choose_preset(n_bytes)]
    _check_vocab_size(vocab_size)
    key = {
        "version": CACHE_VERSION,
        "tokenizers": importlib.metadata.version("tokenizers"),
        "data": fingerprint(files),
        "vocab_size": vocab_size,
        "encoding": encoding,
        "text_field": text_field,
        "val_fraction": val_fraction,
    }
    path = None if folder is None else Path(folder) / "bpe.json"
    cached = None if path is None else _open_cache(path, key, reporter)
    if cached is not None:
        return cached
    n_text = n_bytes
    if val_fraction:  # what is held out must not be looked at
        n_text = utf8_bytes(files, encoding=encoding, text_field=text_field)
    n_train = n_text - int(n_text * val_fraction)
    throughput = Throughput(reporter, "reading for the tokenizer", sum(map(_size, files)))
    documents = read_documents(
        files, encoding=encoding, text_field=text_field, on_read=throughput.add
    )
    sample = sample_texts(_leading(documents, n_train), n_train)
    reporter.end_progress()
    what = f"training a tokenizer of {vocab_size} tokens on "
    n_sample = sum(len(text.encode()) for text in sample)
    if n_sample < 0.9 * n_train:
        reporter.say(f"{what}{count(n_sample)}B spread over {count(n_train)}B of text")
    else:
        reporter.say(f"{what}the text")
    tokenizer = train_bpe(sample, vocab_size, reporter=reporter)
    if path is not None:
        content = json.dumps({"key": key, "tokenizer": tokenizer.to_dict()}).encode()
        path.parent.mkdir(exist_ok=True)
        remove_stale(path)
        publish(path, lambda file: file.write(content))
    return tokenizer


def _size(file: Path) -> int:
    return file.stat().st_size


def _open_cache(path: Path, key: dict[str, Any], reporter: Reporter) -> Tokenizer | None:
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_bytes())
        if found["key"] != key:
            return None
        return tokenizer_from_dict(found["tokenizer"])
    except (ValueError, LookupError, TypeError, ArtefactError) as error:
        reporter.say(f"warning: {path} is damaged ({error!r}): the tokenizer is trained again")
        return None


def _leading(documents: Iterable[Piece], n_bytes: int) -> Iterator[str]:
    for text, _ in documents:
        if n_bytes <= 0:
            return
        encoded = text.encode()
        yield encoded[:n_bytes].decode("utf-8", "ignore")  # drops at most a character cut in two
        n_bytes -= len(encoded)


def sample_texts(texts: Iterable[str], n_bytes: int) -> list[str]:
    """Some of the texts, in their order and spread evenly over n_bytes of them; all, of few.

    At most SAMPLE_BYTES, of which about DISTINCT_BYTES are in words that differ. n_bytes too low
    (a .gz cannot always tell) gives more of the beginning, and no more in all.
    """
    part = min(1.0, SAMPLE_BYTES / max(1, n_bytes))
    sample: list[str] = []
    seen = kept = 0
    for text in texts:
        size = len(text.encode())
        seen += size
        near = kept + size <= part * seen + size / 2  # the line, as whole texts come to it
        if near or not sample:
            if sample and kept + size > SAMPLE_BYTES:
                break
            sample.append(text)
            kept += size
    # Words as white space parts them: the trainer's are parts of these, so no more in all.
    words: set[str] = set()
    distinct = 0
    chosen: list[int] = []
    for i in _spread(len(sample)):
        new = set(sample[i].split()) - words
        distinct += sum(len(word.encode()) for word in new)
        if distinct > DISTINCT_BYTES and chosen:
            break
        words |= new
        chosen.append(i)
    return [sample[i] for i in sorted(chosen)]


def _spread(n: int) -> list[int]:
    """0 to n - 1 such that any first few are spread over all. Example: 4 -> [0, 2, 1, 3]."""
    bits = max(1, (n - 1).bit_length())
    order = (int(f"{i:0{bits}b}"[::-1], 2) for i in range(1 << bits))  # van der Corput's
    return [i for i in order if i < n]


def train_bpe(
    texts: Iterable[str], vocab_size: int, *, reporter: Reporter | None = None
) -> BPETokenizer:
    """Byte-level BPE with GPT-2's split; n_vocab is vocab_size, less where the text ends sooner.

    vocab_size counts the 256 bytes, which come first and in order, the merges and `<|endoftext|>`.
    Holds all different words in memory, see `sample_texts`. Raises UsageError for a size that has
    no room for the bytes.
    """
    _check_vocab_size(vocab_size)
    from tokenizers import Tokenizer as Trainable
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.trainers import BpeTrainer

    trainable = Trainable(BPE())
    trainable.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=True)  # GPT-2's split
    trainer = BpeTrainer(
        vocab_size=vocab_size - 1,
        min_frequency=2,  # a pair seen once is not worth a token
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    reporter = Reporter(quiet=True) if reporter is None else reporter
    trainable.train_from_iterator(_short(texts, vocab_size, reporter), trainer)
    reporter.end_progress()
    model = json.loads(trainable.to_str())["model"]
    byte_of = _bytes_of_characters()
    by_id = sorted(model["vocab"], key=model["vocab"].__getitem__)
    merged = [bytes(byte_of[c] for c in token) for token in by_id if len(token) > 1]
    return BPETokenizer([bytes([byte]) for byte in range(256)] + merged)


def _short(texts: Iterable[str], vocab_size: int, reporter: Reporter) -> Iterator[str]:
    """The texts in what the trainer takes for one; says how far it is, as it cannot itself."""
    done = 0
    for text in texts:
        yield from pieces(text, _BPE_WORD_CHARACTERS)
        done += len(text)
        reporter.progress(f"tokenizer: counting words | {count(done)} characters")
    reporter.progress(f"tokenizer: merging pairs to {vocab_size} tokens")


def _check_vocab_size(vocab_size: int) -> None:
    if vocab_size < SimpleTokenizer.n_vocab:
        raise UsageError(
            f"vocab_size is {vocab_size}: expected at least {SimpleTokenizer.n_vocab}, "
            "the 256 bytes and the end-of-text token"
        )


def _bytes_of_characters() -> dict[str, int]:
    """The byte that each character stands for in GPT-2's printable spelling of bytes.

    Printable Latin-1 is itself, the rest follows 255. Source: gpt-2/src/encoder.py.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(rest)}


def _gpt2_tokenizer(ranks: str | os.PathLike[str] | None) -> BPETokenizer:
    if ranks is not None:
        path = Path(ranks)
        try:
            content = path.read_bytes()
        except OSError as error:  # also a name that is too long
            raise ArtefactError(
                f"{path}: {error.strerror}: expected a file of ranks, as tiktoken has for gpt2"
            ) from error
        return BPETokenizer(parse_ranks(content, name=str(path)))
    import tiktoken

    try:
        encoding = tiktoken.get_encoding("gpt2")
    except OSError as error:  # also what requests raises without a network
        raise PicoEdgeError(
            "the gpt2 ranks are not on this machine and could not be downloaded "
            f"({type(error).__name__}): connect once, or give them with --ranks FILE"
        ) from error
    return BPETokenizer([encoding.decode_single_token_bytes(i) for i in range(encoding.eot_token)])
