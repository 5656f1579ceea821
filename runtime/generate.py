"""Prompts -> text: the one loop behind `Model.generate`, `Model.stream` and batches.

Joins Session, sampling and tokenizer: prefill, then draw, detokenize, look for stops and decode,
token by token. Knows nothing of onnxruntime, terminals or files beyond the path of the model.

Try: `Model("model.onnx").generate("Hello", max_new_tokens=20, seed=1).text`.
"""

from __future__ import annotations

import copy
import dataclasses
import numbers
import os
import secrets
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter as clock
from typing import Any, Literal, TypedDict, Unpack, overload

from pico_edge import artefact
from pico_edge.artefact import tokens_kept
from pico_edge.config import GPTConfig
from pico_edge.errors import ArtefactError, UsageError
from pico_edge.runtime.adjust import Adjuster, Token, adjusts, resolve_banned, resolve_bias
from pico_edge.runtime.cache import Cache
from pico_edge.runtime.philox import uniform, uniforms
from pico_edge.runtime.portable import PortableCache
from pico_edge.runtime.prefix import KeptCache
from pico_edge.runtime.sampling import ContextOverflow, Logits, Sampler, Sampling, check_seed
from pico_edge.runtime.score import TokenLogprob, TokenScore, score_ids, token_logprob
from pico_edge.runtime.session import Session
from pico_edge.runtime.speculate import SPECULATE, Speculate, Speculation, speculate_with
from pico_edge.tokenizer import TextStream, Tokenizer

# Random numbers made at a time: between two steps a call costs 20 us, 0.6 a number.
UNIFORMS_AHEAD = 32

AnyCache = Cache | PortableCache | Speculation
FinishReason = Literal["length", "stop", "context", "eos", "cancelled"]


@dataclass(frozen=True)
class Generation:
    """One finished text. `to_dict` gives the JSON of `pico-edge generate --json`.

    text: the continuation, without the prompt, a stop or the end-of-text token. token_ids: the
    tokens drawn, also those of a stop, but no end-of-text; new_tokens is their number.
    prompt_tokens: tokens of the prompt, 1 for an empty one. finish_reason: "length" max_new_tokens
    are made, "stop" a stop text came, "context" the context is full and context_overflow is "stop",
    "eos" the model ended the text, "cancelled" the caller did. time_to_first_token_s: seconds of
    wall clock from the tokenized prompt to the first token. The rates are
    those of this text alone, over the tokens of the prompt and over those after the first, without
    the time the reader of a stream takes; 0.0 where nothing was measured. logprobs: one per token
    of token_ids, None unless asked for. drafted_tokens: guesses of `speculate` that the model
    checked, accepted_tokens: those that came.
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
    logprobs: list[TokenLogprob] | None = None
    drafted_tokens: int = 0
    accepted_tokens: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; without logprobs if nobody asked for them."""
        values = dataclasses.asdict(self)
        if self.logprobs is None:
            del values["logprobs"]
        return values


class Options(TypedDict, total=False):
    """Arguments of `generate`; what is missing or None has the default of the file.

    Those of Sampling, and: stop: a text, or several, that end the generation and are no part of it.
    seed: 0 to 2**63 - 1; drawn and reported if missing. Row i of a batch draws as sample i, so a
    batch of equal prompts gives different texts. logit_bias: token -> what is added to its logit;
    banned_tokens: tokens that are never drawn; a token is an id or a text that is one token.
    logprobs: True reports the log-probability of each token drawn under the model itself, a number
    also those of so many of the likeliest. allow_special: `<|endoftext|>` in a prompt is the token
    of that name, not plain text. speculate: check several guessed tokens in one call: "auto" where
    it pays, "on", "off"; see `pico_edge.runtime.speculate`. cancel: asked after every token, True
    ends the generation; for signals and other threads.

    For a list of prompts, max_new_tokens and seed may be lists of one number per prompt, and stop a
    list of one list of texts per prompt (`[["a"], []]`; `["a", "b"]` are two stops of every
    prompt). With a list of seeds each row draws as sample 0: its text is that of the prompt alone,
    but for rounding where two tokens are almost equally likely.
    """

    max_new_tokens: int | Sequence[int] | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    typical_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    no_repeat_ngram_size: int | None
    min_new_tokens: int | None
    context_overflow: ContextOverflow | None
    stop: str | Sequence[str] | Sequence[Sequence[str]] | None
    seed: int | Sequence[int] | None
    logit_bias: Mapping[Token, float] | None
    banned_tokens: Sequence[Token] | None
    logprobs: bool | int | None
    allow_special: bool | None
    speculate: Speculate | None
    cancel: Callable[[], bool] | None


class Model:
    """A `model.onnx` ready to generate; arguments and errors are those of Session.

    May be used again after an error, and by several threads: every call has a cache of its own.
    reuse_prefix: keep the cache of the last generation of a single prompt; a prompt that begins as
    that text did only computes the rest. The text is the same but for rounding: where two tokens
    are almost equally likely it may depend on what was generated before. lean: see Session.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        provider: str = "auto",
        threads: str | int = "auto",
        allow_foreign: bool = False,
        *,
        reuse_prefix: bool = False,
        lean: bool = False,
    ) -> None:
        self.session = Session(
            path, provider=provider, threads=threads, allow_foreign=allow_foreign, lean=lean
        )
        self.config: GPTConfig = self.session.config
        self.tokenizer: Tokenizer = self.session.tokenizer
        try:
            self.sampling = Sampling(**self.session.sampling)
        except (TypeError, UsageError) as error:
            raise ArtefactError(f"{path}: sampling defaults: {error}") from error
        self._kept = KeptCache() if reuse_prefix else None

    @property
    def info(self) -> dict[str, Any]:
        """What the file says of itself, as plain values: a copy of its metadata.

        Keys: format_version, config, tokenizer, sampling, export, provenance, parity; and file,
        bytes, provider, threads.
        """
        session = self.session
        metadata = {
            key.removeprefix(artefact.KEY_PREFIX): copy.deepcopy(value)
            for key, value in session.metadata.items()
        }
        return {
            "file": str(session.path),
            "bytes": session.size,
            "provider": session.provider,
            "threads": session.threads,
            **metadata,
        }

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
        if not isinstance(prompt, str | list | tuple):
            raise UsageError(
                f"prompt is a {type(prompt).__name__}: expected text, or a list of texts"
            )
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        texts = self._texts(prompts, options)
        for _ in _run(self.session, texts, options.get("cancel"), self._kept):
            pass
        _give_back(texts, self._kept)
        results = [text.generation(self.session) for text in texts]
        return results[0] if isinstance(prompt, str) else results

    def stream(self, prompt: str = "", **options: Unpack[Options]) -> Stream:
        """The text of `generate` in pieces, each as soon as it is valid UTF-8 and not a stop."""
        (text,) = self._texts([prompt], options)
        return Stream(self.session, text, options.get("cancel"), self._kept)

    def score(self, text: str, *, allow_special: bool = False) -> list[TokenScore]:
        """Log-probability of each token of a text, given those before it.

        The first one is given end-of-text, as a text that is started from nothing: `exp` of the
        sum is the probability that the model, unfiltered, writes this. A text longer than the
        context is read in windows; each token says how many tokens were before it (`score_ids`).
        """
        if not isinstance(text, str):
            raise UsageError(f"text is a {type(text).__name__}: expected text")
        return score_ids(self.session, self.tokenizer.encode(text, allow_special=allow_special))

    def _texts(self, prompts: Sequence[str], options: Options) -> list[_Text]:
        """Check all arguments before any work is done."""
        given: dict[str, Any] = {name: v for name, v in options.items() if v is not None}
        cancel = given.pop("cancel", None)
        if cancel is not None and not callable(cancel):
            raise UsageError(f"cancel is {cancel!r}: expected a function without arguments")
        allow_special = bool(given.pop("allow_special", False))
        n_top = _check_logprobs(given.pop("logprobs", False))
        bias = resolve_bias(given.pop("logit_bias", None), self.tokenizer)
        banned = resolve_banned(given.pop("banned_tokens", None), self.tokenizer)
        stops = _stops(given.pop("stop", ()), len(prompts))
        speculate = given.pop("speculate", "auto")
        if speculate not in SPECULATE:
            raise UsageError(f"speculate is {speculate!r}: expected {', '.join(SPECULATE)}")
        seed = given.pop("seed", None)
        fixed = seed is not None
        if seed is None:
            seed = secrets.randbelow(1 << 32)  # short enough to be typed again
        seeds, own_seeds = _per_prompt("seed", seed, len(prompts))
        for each in seeds if own_seeds else [seed]:
            check_seed(each)
        lengths, _ = _per_prompt(
            "max_new_tokens",
            given.pop("max_new_tokens", self.sampling.max_new_tokens),
            len(prompts),
        )
        for prompt in prompts:
            if not isinstance(prompt, str):
                raise UsageError(f"prompt is a {type(prompt).__name__}: expected text")
        if not prompts:
            dataclasses.replace(self.sampling, **given)
        return [
            _Text(
                prompt,
                self.tokenizer.encode(prompt, allow_special=allow_special),
                self.tokenizer,
                dataclasses.replace(self.sampling, max_new_tokens=lengths[number], **given),
                stops[number],
                int(seeds[number]),
                0 if own_seeds else number,
                bias,
                banned,
                n_top,
                speculate,
                fixed,
            )
            for number, prompt in enumerate(prompts)
        ]


def _per_prompt(name: str, value: Any, n: int) -> tuple[list[Any], bool]:
    """One value per prompt, and whether they were given so; `value` is one for all, or a list."""
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        return [value] * n, False
    if len(value) != n:
        raise UsageError(
            f"{name} has {len(value)} values for {n} prompts: expected one, or one per prompt"
        )
    return list(value), True


def _stops(stop: Any, n: int) -> list[tuple[str, ...]]:
    """The stops of each prompt: the same for all, or, where `stop` holds a list, one list each."""
    given = (stop,) if isinstance(stop, str) else stop
    if not isinstance(given, list | tuple):
        raise UsageError(f"stop is {stop!r}: expected a text, or a list of texts")
    own = any(isinstance(each, list | tuple) for each in given)
    if own and len(given) != n:
        raise UsageError(
            f"stop has {len(given)} entries for {n} prompts: expected texts, or a list per prompt"
        )
    each_given = given if own else [given] * n
    for row in each_given if own else ():
        if not isinstance(row, str | list | tuple):
            raise UsageError(f"stop holds {row!r}: expected a list of texts for each prompt")
    rows = [(row,) if isinstance(row, str) else tuple(row) for row in each_given]
    for row in rows if own else [given]:
        if not all(isinstance(text, str) and text for text in row):
            raise UsageError(f"stop is {row!r}: expected texts that are not empty")
    return rows


def _check_logprobs(value: Any) -> int | None:
    """How many of the likeliest tokens to report with each drawn one; None for no report."""
    if isinstance(value, bool):
        return 0 if value else None
    if not isinstance(value, numbers.Integral) or value < 0:
        raise UsageError(f"logprobs is {value!r}: expected True, or how many tokens, 0 or more")
    return int(value)


class Stream:
    """An iterator over the pieces of one text; `result` is its Generation once it has ended.

    Leaving it cancels: no token is made that nobody asked for.
    """

    def __init__(
        self,
        session: Session,
        text: _Text,
        cancel: Callable[[], bool] | None = None,
        kept: KeptCache | None = None,
    ) -> None:
        self._session = session
        self._text = text
        self._kept = kept
        self._cancelled = cancelled = threading.Event()
        # Holds nothing of self: a stream that is left is then freed at once, with its cache.
        self._pieces = _run(
            session, [text], lambda: cancelled.is_set() or (cancel is not None and cancel()), kept
        )

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> str:
        if self._cancelled.is_set() and self._text.finish_reason is None:
            self.close()
        try:
            for _, piece in self._pieces:
                return piece
        except BaseException:
            self._text.cache = None  # what it holds is not known
            raise
        _give_back([self._text], self._kept)
        raise StopIteration

    def close(self) -> None:
        """Stop here and free the cache; `result` then is what came so far, "cancelled".

        Only for the thread that reads; any other calls `cancel`.
        """
        self._pieces.close()
        if self._text.finish_reason is None:
            self._text.end("cancelled")
        _give_back([self._text], self._kept)

    def cancel(self) -> None:
        """End after the token that is being made; may be called from any thread, at any time.

        The reader then finds the end of the stream, and "cancelled" in its result.
        """
        self._cancelled.set()

    @property
    def result(self) -> Generation:
        """Raises ValueError before the end, and after an error until the stream is closed."""
        if self._text.finish_reason is None:
            raise ValueError(
                "the stream has not ended: read it to the end, or close it after an error"
            )
        return self._text.generation(self._session)


def _run(
    session: Session,
    texts: Sequence[_Text],
    cancel: Callable[[], bool] | None,
    kept: KeptCache | None = None,
) -> Generator[tuple[int, str], None, None]:
    """Make all texts, as one batch; yields (number of the text, piece of it) as they come.

    When the window of block_size tokens of a row is full, it starts again with its newest part
    (`tokens_kept`), or the text ends: `context_overflow`. What is before the window is not seen any
    more. Each row does what it would do alone; a row whose text has ended leaves the batch.
    """
    started = clock()
    paused = 0.0  # while the caller has the piece
    window = session.config.block_size
    for text in texts:
        if text.sampling.max_new_tokens == 0:
            text.finish_reason = "length"
        elif len(text.ids) > window and text.sampling.context_overflow == "stop":
            text.finish_reason = "context"
    numbered = [(n, text) for n, text in enumerate(texts) if text.finish_reason is None]
    if not numbered:
        return
    made, logits = _prefill(session, [text.ids[-window:] for _, text in numbered], kept)
    prefill_s = clock() - started
    for _, text in numbered:
        text.started, text.prefill_s = started, prefill_s
    cache = texts[0].decode_with(session, made) if len(texts) == 1 else made
    n_vocab = session.tokenizer.n_vocab  # a padded vocabulary has rows that mean nothing
    rows = list(logits[:, :n_vocab])
    token_ids = [0] * len(numbered)
    live = [(row, number, text) for row, (number, text) in enumerate(numbered)]
    idle: list[int] = []  # rows without a text, where they cannot leave: fed, and never read
    while True:
        ended = False
        for row, number, text in live:
            piece = text.draw(rows[row], full=cache.lengths[row] == window)
            now = clock()
            text.drawn_s.append(now - paused)
            if piece:
                yield number, piece
                paused += clock() - now
            if text.finish_reason is not None:
                ended = True
        if cancel is not None and cancel():
            for _, number, text in live:
                if text.finish_reason is None and (piece := text.end("cancelled")):
                    yield number, piece
            return
        if ended:
            going = [each for each in live if each[2].finish_reason is None]
            if not going:
                return
            kept_rows = cache.keep_rows([row for row, _, _ in going])
            live = [(row, n, text) for row, (_, n, text) in zip(kept_rows, going, strict=True)]
            idle = [row for row in range(cache.batch) if row not in kept_rows]
            token_ids = [0] * cache.batch
        for row in idle:
            cache.truncate(row, 0)
        for row, _, text in live:
            token_ids[row] = text.ids[-1]
            if cache.lengths[row] == window:
                _slide(cache, row, text.ids, tokens_kept(window))
        after = cache.decode(token_ids)
        if after is not logits:
            logits, rows = after, list(after[:, :n_vocab])


def _prefill(
    session: Session, prompts: Sequence[list[int]], kept: KeptCache | None
) -> tuple[Cache | PortableCache, Logits]:
    """A cache that holds the prompts, and the logits (B, V) of the tokens after them."""
    if kept is not None and len(prompts) == 1:
        cache = kept.take(prompts[0])
        if cache is not None and cache.lengths[0] > 0:
            return cache, cache.append(0, prompts[0][cache.lengths[0] :])
        if cache is not None:
            return cache, cache.prefill(prompts)
    cache = session.new_cache(len(prompts))
    return cache, cache.prefill(prompts)


def _give_back(texts: Sequence[_Text], kept: KeptCache | None) -> None:
    """Keep the cache of a single text that has ended without an error."""
    if kept is not None and len(texts) == 1:
        texts[0].give_back(kept)


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
        bias: Mapping[int, float],
        banned: Sequence[int],
        n_top: int | None,
        speculate: Speculate,
        fixed: bool,
    ) -> None:
        self.prompt = prompt
        self.ids = ids or [tokenizer.eot_id]
        self.sampling = sampling
        self.finish_reason: FinishReason | None = None
        self.ended_itself = False  # drew end-of-text, which is not among the ids
        self.cache: Cache | PortableCache | None = None  # set where the cache may be kept
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
        # The same text must come again.
        self._fixed = fixed or sampling.temperature == 0 or sampling.top_k == 1
        self._speculation: Speculation | None = None
        self._pieces: list[str] = []
        self._held = ""
        self._uniforms: list[float] = []  # of the positions to come, the next one last
        self._sampler = Sampler(sampling)
        self._min_end = self._n_prompt + sampling.min_new_tokens
        self._adjuster: Adjuster | None = None
        if adjusts(sampling, bias, banned):
            self._adjuster = Adjuster(
                sampling,
                self.ids,
                tokenizer.n_vocab,
                eot_id=tokenizer.eot_id,
                bias=bias,
                banned=banned,
            )
        self._n_top = n_top
        self._logprobs: list[TokenLogprob] = []

    def decode_with(self, session: Session, cache: Cache | PortableCache) -> AnyCache:
        """The cache, or one that checks drafts with it, for a text that has it for itself."""
        self.cache = cache
        self._speculation = speculate_with(
            session, cache, self.ids, self._speculate, fixed=self._fixed
        )
        return self._speculation or cache

    def give_back(self, kept: KeptCache) -> None:
        """Keep the cache, if there is one, for the next prompt; called when the text has ended."""
        cache, self.cache = self.cache, None
        if cache is None:
            return
        if self._speculation is not None:  # without drafts that did not come
            cache.truncate(0, min(cache.lengths[0], self._speculation.lengths[0]))
        # Not the last token, which was drawn and never decoded; end-of-text is not among the ids.
        end = len(self.ids) if self.ended_itself else len(self.ids) - 1
        kept.give(cache, self.ids[end - cache.lengths[0] : end])

    def draw(self, logits: Logits, *, full: bool) -> str:
        """Choose the next token; the text that is ready to be shown. full: so is the window."""
        plain = logits
        if self._adjuster is not None:
            logits = self._adjuster.adjust(logits)
        if not self._uniforms:
            ahead = uniforms(self._seed, len(self.ids), self._number, n=UNIFORMS_AHEAD)
            self._uniforms = ahead[::-1]
        u = self._uniforms.pop()
        token_id = self._sampler.draw(logits, u, self._again)
        if token_id == self._eot_id:
            self.finish_reason, self.ended_itself = "eos", True
            return self._ready("")
        self.ids.append(token_id)
        if self._adjuster is not None:
            self._adjuster.add(token_id)
        if self._n_top is not None:
            self._logprobs.append(token_logprob(plain, token_id, self._n_top))
        if len(self.ids) == self._end:
            self.finish_reason = "length"
        elif full and self.sampling.context_overflow == "stop":
            self.finish_reason = "context"
        piece = self._stream.feed((token_id,))
        if self.finish_reason or self._stops:
            return self._ready(piece)
        self._pieces.append(piece)
        return piece

    def _again(self, n: int) -> float:
        """The n-th further number for the token that is being drawn."""
        return uniform(self._seed, len(self.ids), self._number, n)

    def end(self, reason: FinishReason) -> str:
        """End here; the text that was held back until now."""
        self.finish_reason = reason
        return self._ready("")

    def _ready(self, piece: str) -> str:
        """What can be shown now that this piece came; notices stops."""
        if self.finish_reason:
            piece += self._stream.flush()
        if self._stops:
            piece, self._held, found = split_at_stop(
                self._held + piece,
                self._stops,
                searched=len(self._held),
                may_end=len(self.ids) >= self._min_end,
            )
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
            logprobs=None if self._n_top is None else list(self._logprobs),
            drafted_tokens=self._speculation.drafted if self._speculation else 0,
            accepted_tokens=self._speculation.accepted if self._speculation else 0,
        )


def split_at_stop(
    text: str, stops: Sequence[str], *, searched: int = 0, may_end: bool = True
) -> tuple[str, str, bool]:
    """Text before the first stop, text that may be the start of one, and whether a stop is there.

    The first stop is the one complete first, the longest of these: how the text is cut into pieces
    makes no difference. searched: characters in which no stop may end any more. may_end: False only
    holds back, and takes no stop for one.
    Example: "to be, o" and ["or"] -> "to be, ", "o", False; then "or" -> "", "", True.
    """
    if may_end:
        places = [(text.find(stop, max(0, searched - len(stop) + 1)), stop) for stop in stops]
        found = [(at + len(stop), at) for at, stop in places if at >= 0]
        if found:
            return text[: min(found)[1]], "", True
    longest = min(len(text), max(map(len, stops)) - 1)
    for n in range(longest, 0, -1):
        if any(stop.startswith(text[-n:]) for stop in stops):
            return text[:-n], text[-n:], False
    return text, "", False
