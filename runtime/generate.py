"""Prompts -> text: the one loop behind `Model.generate`, `Model.stream` and batches.

Joins Session, sampling and tokenizer: prefill, then draw, detokenize, look for stops and decode,
token by token. Knows nothing of onnxruntime, terminals or files beyond the path of the model.

Try: `Model("model.onnx").generate("Hello", max_new_tokens=20, seed=1).text`.
"""

from __future__ import annotations

import dataclasses
import os
import secrets
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from time import perf_counter as clock
from typing import Literal, TypedDict, Unpack, overload

import numpy as np

from pico_edge.config import GPTConfig
from pico_edge.errors import ArtefactError, UsageError
from pico_edge.runtime.philox import uniforms
from pico_edge.runtime.portable import PortableCache
from pico_edge.runtime.sampling import (
    ContextOverflow,
    Logits,
    Sampler,
    Sampling,
    check_seed,
    penalize,
)
from pico_edge.runtime.session import Cache, Session
from pico_edge.runtime.speculate import SPECULATE, Speculate, Speculation, speculate_with
from pico_edge.tokenizer import TextStream, Tokenizer

# Random numbers made at a time: between two steps a call costs 20 us, 0.6 a number.
UNIFORMS_AHEAD = 32

AnyCache = Cache | PortableCache | Speculation
FinishReason = Literal["length", "stop", "context", "eos", "cancelled"]


@dataclass(frozen=True)
class Generation:
    """One finished text. `dataclasses.asdict` gives the JSON of `pico-edge generate --json`.

    text: the continuation, without the prompt, a stop or the end-of-text token. token_ids: the
    tokens drawn, also those of a stop, but no end-of-text; new_tokens is their number.
    prompt_tokens: tokens of the prompt, 1 for an empty one. finish_reason: "length" max_new_tokens
    are made, "stop" a stop text came, "context" the context is full and context_overflow is "stop",
    "eos" the model ended the text, "cancelled" the caller did. time_to_first_token_s: seconds of
    wall clock from the tokenized prompt to the first token. The rates are those of this text alone,
    over the tokens of the prompt and over those after the first, without the time the reader of a
    stream takes; 0.0 where nothing was measured. drafted_tokens: guesses of `speculate` that the
    model checked, accepted_tokens: those that came.
    """

    prompt: str
    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    prompt_tokens: int
    new_tokens: int
    time_to_first_token_s: float
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    provider: str
    threads: int
    seed: int
    drafted_tokens: int = 0
    accepted_tokens: int = 0


class Options(TypedDict, total=False):
    """Arguments of `generate`; what is missing or None has the default of the file.

    Those of Sampling, and: stop: a text, or several, that end the generation and are no part of it.
    seed: 0 to 2**63 - 1; drawn and reported if missing. Row i of a batch draws as sample i, so a
    batch of equal prompts gives different texts. allow_special: `<|endoftext|>` in a prompt is the
    token of that name, not plain text. speculate: check several guessed tokens in one call: "auto"
    where it pays, "on", "off"; see `pico_edge.runtime.speculate`. cancel: asked after every token,
    True ends the generation; for signals and other threads.
    """

    max_new_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    context_overflow: ContextOverflow | None
    stop: str | Sequence[str] | None
    seed: int | None
    allow_special: bool | None
    speculate: Speculate | None
    cancel: Callable[[], bool] | None


class Model:
    """A `model.onnx` ready to generate; arguments and errors are those of Session.

    May be used again after an error, and by several threads: every call has a cache of its own.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        provider: str = "auto",
        threads: str | int = "auto",
        allow_foreign: bool = False,
    ) -> None:
        self.session = Session(
            path, provider=provider, threads=threads, allow_foreign=allow_foreign
        )
        self.config: GPTConfig = self.session.config
        self.tokenizer: Tokenizer = self.session.tokenizer
        if self.tokenizer.n_vocab > self.config.vocab_size:
            raise ArtefactError(
                f"{path}: its tokenizer has {self.tokenizer.n_vocab} tokens, its model "
                f"{self.config.vocab_size}: export the checkpoint again"
            )
        try:
            self.sampling = Sampling(**self.session.sampling)
        except (TypeError, UsageError) as error:
            raise ArtefactError(f"{path}: sampling defaults: {error}") from error

    @overload
    def generate(self, prompt: str = "", **options: Unpack[Options]) -> Generation: ...

    @overload
    def generate(
        self, prompt: list[str] | tuple[str, ...], **options: Unpack[Options]
    ) -> list[Generation]: ...

    def generate(
        self, prompt: str | list[str] | tuple[str, ...] = "", **options: Unpack[Options]
    ) -> Generation | list[Generation]:
        """Continue a prompt, or each of a list of prompts, these as one batch; see Options.

        An empty prompt starts from end-of-text. Raises UsageError for an argument, PicoEdgeError
        when the model gives logits that are not finite.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        texts = self._texts(prompts, options)
        for _ in _run(self.session, texts, options.get("cancel")):
            pass
        results = [text.generation(self.session) for text in texts]
        return results[0] if isinstance(prompt, str) else results

    def stream(self, prompt: str = "", **options: Unpack[Options]) -> Stream:
        """The text of `generate` in pieces, each as soon as it is valid UTF-8 and not a stop."""
        (text,) = self._texts([prompt], options)
        return Stream(self.session, text, options.get("cancel"))

    def _texts(self, prompts: Sequence[str], options: Options) -> list[_Text]:
        """Check all arguments before any work is done."""
        given = {name: value for name, value in options.items() if value is not None}
        given.pop("cancel", None)
        allow_special = bool(given.pop("allow_special", False))
        stops = given.pop("stop", ())
        stops = (stops,) if isinstance(stops, str) else tuple(stops)  # type: ignore[arg-type]
        if not all(isinstance(stop, str) and stop for stop in stops):
            raise UsageError(f"stop is {stops!r}: expected texts that are not empty")
        speculate = given.pop("speculate", "auto")
        if speculate not in SPECULATE:
            raise UsageError(f"speculate is {speculate!r}: expected {', '.join(SPECULATE)}")
        seed = given.pop("seed", None)
        fixed = seed is not None
        if seed is None:
            seed = secrets.randbelow(1 << 32)  # short enough to be typed again
        check_seed(seed)
        sampling = dataclasses.replace(self.sampling, **given)  # type: ignore[arg-type]
        for prompt in prompts:
            if not isinstance(prompt, str):
                raise UsageError(f"prompt is a {type(prompt).__name__}: expected text")
        return [
            _Text(
                prompt,
                self.tokenizer.encode(prompt, allow_special=allow_special),
                self.tokenizer,
                sampling,
                stops,
                int(seed),  # type: ignore[call-overload]
                number,
                speculate,
                fixed or sampling.temperature == 0 or sampling.top_k == 1,
            )
            for number, prompt in enumerate(prompts)
        ]


class Stream:
    """An iterator over the pieces of one text; `result` is its Generation once it has ended.

    Leaving it cancels: no token is made that nobody asked for.
    """

    def __init__(
        self, session: Session, text: _Text, cancel: Callable[[], bool] | None = None
    ) -> None:
        self._session = session
        self._text = text
        self._pieces = _run(session, [text], cancel)

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> str:
        return next(self._pieces)[1]

    def close(self) -> None:
        """Stop here and free the cache; `result` then is what came so far, "cancelled"."""
        self._pieces.close()
        if self._text.finish_reason is None:
            self._text.finish_reason = "cancelled"

    @property
    def result(self) -> Generation:
        """Raises ValueError before the end."""
        if self._text.finish_reason is None:
            raise ValueError("the stream has not ended: read it to the end, or close it")
        return self._text.generation(self._session)


def _run(
    session: Session, texts: Sequence[_Text], cancel: Callable[[], bool] | None
) -> Generator[tuple[int, str], None, None]:
    """Make all texts, as one batch; yields (row, piece of its text) as they come.

    When the window of block_size tokens of a row is full, it starts again with the newest half,
    block_size // 2 tokens, or the text ends: `context_overflow`. What is before the window is not
    seen any more. Each row does what it would do alone.
    """
    started = clock()
    paused = 0.0  # while the caller has the piece
    window = session.config.block_size
    for text in texts:
        if text.sampling.max_new_tokens == 0:
            text.finish_reason = "length"
        elif len(text.ids) > window and text.sampling.context_overflow == "stop":
            text.finish_reason = "context"
    if all(text.finish_reason for text in texts):
        return
    new = session.new_cache(len(texts))
    # A row that has ended is fed a token that nobody reads, to keep the batch in one piece.
    logits = new.prefill([[0] if text.finish_reason else text.ids[-window:] for text in texts])
    prefill_s = clock() - started
    for text in texts:
        text.started, text.prefill_s = started, prefill_s
    cache = texts[0].speculation(session, new) if len(texts) == 1 else new
    n_vocab = session.tokenizer.n_vocab  # a padded vocabulary has rows that mean nothing
    rows = list(logits[:, :n_vocab])
    token_ids = [0] * len(texts)
    live = [(row, text) for row, text in enumerate(texts) if text.finish_reason is None]
    idle = [row for row, text in enumerate(texts) if text.finish_reason is not None]
    while True:
        ended = False
        for row, text in live:
            piece = text.draw(rows[row], full=cache.lengths[row] == window)
            now = clock()
            text.drawn_s.append(now - paused)
            if piece:
                yield row, piece
                paused += clock() - now
            if text.finish_reason is not None:
                ended = True
        if cancel is not None and cancel():
            for _, text in live:
                text.finish_reason = text.finish_reason or "cancelled"
            ended = True
        if ended:
            idle += [row for row, text in live if text.finish_reason is not None]
            live = [(row, text) for row, text in live if text.finish_reason is None]
            if not live:
                return
        for row in idle:
            cache.truncate(row, 0)
        for row, text in live:
            token_ids[row] = text.ids[-1]
            if cache.lengths[row] == window:
                _slide(cache, row, text.ids, window // 2)
        after = cache.decode(token_ids)
        if after is not logits:
            logits, rows = after, list(after[:, :n_vocab])


def _slide(cache: AnyCache, row: int, ids: list[int], keep: int) -> None:
    """Refill a row so that it holds `keep` tokens once the last of the ids is decoded."""
    cache.truncate(row, 0)
    if keep > 1:
        cache.append(row, ids[-keep:-1])


class _Text:
    """One text being made: its tokens, the text that is out, and what is held back of it."""

    def __init__(
        self,
        prompt: str,
        ids: list[int],
        tokenizer: Tokenizer,
        sampling: Sampling,
        stops: tuple[str, ...],
        seed: int,
        number: int,
        speculate: Speculate,
        fixed: bool,
    ) -> None:
        self.prompt = prompt
        self.ids = ids or [tokenizer.eot_id]
        self.sampling = sampling
        self.finish_reason: FinishReason | None = None
        self.started = self.prefill_s = 0.0
        self.drawn_s: list[float] = []  # when each token was drawn
        self._n_prompt = len(self.ids)
        self._end = self._n_prompt + sampling.max_new_tokens
        self._eot_id = tokenizer.eot_id
        self._stream = TextStream(tokenizer)
        self._stops = stops
        self._seed = seed
        self._number = number
        self._speculate = speculate
        self._fixed = fixed  # the same text must come again
        self._speculation: Speculation | None = None
        self._pieces: list[str] = []
        self._held = ""
        self._uniforms: list[float] = []  # of the positions to come, the next one last
        self._sampler = Sampler(sampling)
        self._penalizes = sampling.penalizes
        if self._penalizes:
            self._seen = np.zeros(tokenizer.n_vocab, np.bool_)
            self._seen[self.ids] = True
            self._counts = np.zeros(tokenizer.n_vocab, np.int64)

    def speculation(self, session: Session, cache: AnyCache) -> AnyCache:
        """What to decode with: the cache, or one that checks drafts with it."""
        self._speculation = speculate_with(
            session, cache, self.ids, self._speculate, fixed=self._fixed
        )
        return self._speculation or cache

    def draw(self, logits: Logits, *, full: bool) -> str:
        """Choose the next token; the text that is ready to be shown. full: so is the window."""
        if self._penalizes:
            logits = penalize(logits, self._seen, self._counts, self.sampling)
        if not self._uniforms:
            ahead = uniforms(self._seed, len(self.ids), self._number, n=UNIFORMS_AHEAD)
            self._uniforms = ahead[::-1]
        u = self._uniforms.pop()
        token_id = self._sampler.draw(logits, u)
        if token_id == self._eot_id:
            self.finish_reason = "eos"
            return self._ready("")
        self.ids.append(token_id)
        if self._penalizes:
            self._seen[token_id] = True
            self._counts[token_id] += 1
        if len(self.ids) == self._end:
            self.finish_reason = "length"
        elif full and self.sampling.context_overflow == "stop":
            self.finish_reason = "context"
        piece = self._stream.feed((token_id,))
        if self.finish_reason or self._stops:
            return self._ready(piece)
        self._pieces.append(piece)
        return piece

    def _ready(self, piece: str) -> str:
        """What can be shown now that this piece came; notices stops."""
        if self.finish_reason:
            piece += self._stream.flush()
        if self._stops:
            piece, self._held, found = split_at_stop(self._held + piece, self._stops)
            if found:
                self.finish_reason = "stop"
            elif self.finish_reason:
                piece += self._held
        self._pieces.append(piece)
        return piece

    def generation(self, session: Session) -> Generation:
        """The result; called when finish_reason is set."""
        assert self.finish_reason is not None
        first_s, last_s = (self.drawn_s[0], self.drawn_s[-1]) if self.drawn_s else (0.0, 0.0)
        decode_s = last_s - first_s
        prefilled = min(self._n_prompt, session.config.block_size)
        return Generation(
            prompt=self.prompt,
            text="".join(self._pieces),
            token_ids=self.ids[self._n_prompt :],
            finish_reason=self.finish_reason,
            prompt_tokens=self._n_prompt,
            new_tokens=len(self.ids) - self._n_prompt,
            time_to_first_token_s=first_s - self.started,
            prefill_tokens_per_second=prefilled / self.prefill_s if self.prefill_s else 0.0,
            decode_tokens_per_second=(len(self.drawn_s) - 1) / decode_s if decode_s else 0.0,
            provider=session.provider,
            threads=session.threads,
            seed=self._seed,
            drafted_tokens=self._speculation.drafted if self._speculation else 0,
            accepted_tokens=self._speculation.accepted if self._speculation else 0,
        )


def split_at_stop(text: str, stops: Sequence[str]) -> tuple[str, str, bool]:
    """Text before the first stop, text that may be the start of one, and whether a stop is there.

    The first stop is the one complete first, the longest of these: how the text is cut into pieces
    makes no difference.
    Example: "to be, o" and ["or"] -> "to be, ", "o", False; then "or" -> "", "", True.
    """
    found = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    if found:
        return text[: min(found)[1]], "", True
    longest = min(len(text), max(map(len, stops)) - 1)
    for n in range(longest, 0, -1):
        if any(stop.startswith(text[-n:]) for stop in stops):
            return text[:-n], text[-n:], False
    return text, "", False
