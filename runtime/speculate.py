"""Several tokens from one call of the model: drafts from the text so far and from the file's table
of n-grams, checked by the model itself.

A drafted token counts only if the one drawn from the model's own logits at its place is the same:
by the sampler, penalties and random number of plain decoding. So every text is what the model says,
and a draft only decides how many tokens a call brings. Knows ids and costs, not text or sampling.

The logits of a call of two or more tokens do not depend on how many there are, to the bit; those of
a single step differ by float rounding, and with `MatMulNBits` by codes that this moves (0.15 of
logits of 26 at most, 0.02 on average): at a near tie another token may come. So which tokens share
a call is a function of the file, the text and the flags alone, never of time or threads, wherever a
text must be the same again: greedy, with a given seed, with "on", and in every file whose blocks
are MatMulNBits, since a seed that was drawn is reported. Only otherwise "auto" measures what calls
cost, and stops where drafts do not pay. A batch of several texts does not speculate, nor do files
whose rows depend on each other, nor DirectML, which cannot append.

Try: `Model("model.onnx").generate("To be", speculate="on").accepted_tokens`.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter as clock
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from pico_edge.artefact import worth_drafting
from pico_edge.config import GPTConfig
from pico_edge.ngrams import MAX_ORDER, NGrams
from pico_edge.runtime.cache import Cache
from pico_edge.runtime.session import Session

Speculate = Literal["auto", "on", "off"]
SPECULATE: tuple[Speculate, ...] = get_args(Speculate)
FloatArray = npt.NDArray[np.floating[Any]]
Ids = Sequence[int] | npt.NDArray[np.integer[Any]]

MAX_DRAFT = 15  # tokens; with the one before them 16 rows, two to four tiles of every kernel
# What a further token costs in one call, in steps, where it is not measured: see NOTES.md.
SLOPE_FLOATS = 0.15
SLOPE_ROWS = 0.08
SLOPE_BLOCKS = 0.3  # MatMulNBits: compute decides, not memory, so rows are hardly shared
SLOPE_BLOCKS_INT8_CACHE = 0.4
SLOPE_WIDE_BLOCKS = 0.2
SLOPE_DEVICE = 0.05
WIDE = 512
DRAFTING = 0.05  # what looking for a draft costs, in steps

# The shortest end of the text that is looked up in it: bytes say less than other tokens.
LOOKUP_BYTES, LOOKUP = 4, 2
LONGEST_MATCH = 16
MAX_INDEX = 1 << 16  # places remembered; then it begins anew
# How often a candidate is right, by its source and the length of its context, before this text has
# said: of a 4 x 256 byte model's own text at temperature 0.8. Held for as many trials as PRIOR.
TABLE_CHANCES = (0.85, 0.8, 0.75, 0.55, 0.4, 0.35, 0.3)
LOOKUP_CHANCES = (0.4, 0.4, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.8, 0.85, 0.85, 0.9)
PRIOR = 4.0
MEMORY = 64.0  # trials after which older ones count half
SURE = 0.8  # with such a chance the lookup alone decides, without the table's 2 us
# Where drafts gain less than this over WINDOW tokens, plain steps follow, for FIRST_PAUSE tokens
# and then twice as many each time: what the trials cost is then a small part of most texts.
WINDOW = 64
MIN_GAIN = 1.03
FIRST_PAUSE, MAX_PAUSE = 192, 1536


def slope_for(export: dict[str, Any], config: GPTConfig, device: str) -> float:
    """Cost of a further token in one call, in steps, for a file and device: measured constants."""
    if device != "cpu":
        return SLOPE_DEVICE
    forms = export.get("weights", {})
    if "rows" in forms:
        return SLOPE_ROWS
    if "float32" in forms or "float16" in forms:
        return SLOPE_FLOATS
    if config.n_embd >= WIDE:
        return SLOPE_WIDE_BLOCKS
    return SLOPE_BLOCKS if export.get("cache") == "float32" else SLOPE_BLOCKS_INT8_CACHE


def measures(wanted: Speculate, fixed: bool, export: dict[str, Any], device: str) -> bool:
    """Whether time may decide: only where no text that must come again can depend on it."""
    forms = export.get("weights", {})
    exact = device == "cpu" and ("rows" in forms or "float32" in forms)
    return wanted == "auto" and not fixed and exact


def speculate_with(
    session: Session, cache: object, ids: list[int], wanted: Speculate, *, fixed: bool
) -> Speculation | None:
    """What to decode one text with, or None for plain steps.

    ids: the text, to which the caller adds each token before it decodes it. fixed: a seed was
    given, or none is used. How long the text is to be makes no difference.
    """
    config = session.config
    if wanted == "off" or not isinstance(cache, Cache) or cache.batch != 1:
        return None
    if not session.appends or session.export.get("rows_are_independent") is not True:
        return None
    if wanted == "auto" and not worth_drafting(config):
        return None
    slope = slope_for(session.export, config, session.device)
    return Speculation(
        cache,
        Drafter(ids, session.ngrams, session.tokenizer.n_vocab),
        slope,
        measures=measures(wanted, fixed, session.export, session.device),
    )


class Drafter:
    """Candidates for the tokens to come, with the chance of each, learned while the text grows."""

    def __init__(self, ids: list[int], table: NGrams | None, n_vocab: int) -> None:
        self.ids = ids
        self._table = table
        self._shortest = LOOKUP_BYTES if n_vocab <= 257 else LOOKUP
        self._places: dict[tuple[int, ...], int] = {}  # the end of each: where it was last
        self._indexed = max(self._shortest, len(ids) - MAX_INDEX // 2)
        # Trials and hits by bucket: lookups by length of match, then the table by order.
        self._tries = [PRIOR] * (LONGEST_MATCH + 1 + MAX_ORDER + 1)
        first = 0 if table is None else table.min_order
        chances = [_at(LOOKUP_CHANCES, n - self._shortest) for n in range(LONGEST_MATCH + 1)]
        chances += [_at(TABLE_CHANCES, n - first) for n in range(MAX_ORDER + 1)]
        self._hits = [PRIOR * chance for chance in chances]
        # Of each place of the last draft, the candidates as (bucket, id), until they are judged.
        self._open: list[list[tuple[int, int]]] = []
        self._judged = 0

    def learn(self, token_id: int) -> None:
        """The token that came at the next place: judge the candidates for it."""
        at = self._judged
        if at >= len(self._open):
            return
        candidates = self._open[at]
        for bucket, candidate in candidates:
            self._tries[bucket] += 1.0
            if candidate == token_id:
                self._hits[bucket] += 1.0
            if self._tries[bucket] > MEMORY:
                self._tries[bucket] *= 0.5
                self._hits[bucket] *= 0.5
        self._judged = at + 1
        if candidates[0][1] != token_id:  # what was drafted after it does not follow
            self._open = []

    def forget(self) -> None:
        """Judge nothing of the last draft."""
        self._open = []

    def draft(self, limit: int, price: float) -> list[int]:
        """At most `limit` ids, as many as are likely to be worth it.

        price: what a further token costs in a call, in tokens that plain steps would have made.
        """
        self._open, self._judged = opened, _ = [], 0
        ids, place, match = self.ids, *self._lookup()
        drafted: list[int] = []
        n, tail = len(ids), ids[-MAX_ORDER:]
        chance, expected, best, best_n = 1.0, 0.0, 0.0, 0
        tries, hits, table = self._tries, self._hits, self._table
        while len(drafted) < limit:
            candidates = []
            p = 0.0
            if match:
                token_id = ids[place] if place < n else drafted[place - n]
                bucket = match if match < LONGEST_MATCH else LONGEST_MATCH
                p = hits[bucket] / tries[bucket]
                candidates.append((bucket, token_id))
            if p < SURE and table is not None and (found := table.next(tail)):
                bucket = LONGEST_MATCH + 1 + found[1]
                by_table = hits[bucket] / tries[bucket]
                if by_table > p:
                    candidates.insert(0, (bucket, found[0]))
                    p = by_table
                else:
                    candidates.append((bucket, found[0]))
            if not candidates:
                break
            opened.append(candidates)
            token_id = candidates[0][1]
            if match:
                goes_on = (ids[place] if place < n else drafted[place - n]) == token_id
                place, match = (place + 1, match + 1) if goes_on else (0, 0)
            drafted.append(token_id)
            tail.append(token_id)
            chance *= p
            expected += chance
            gain = expected - price * len(drafted)
            if gain > best:
                best, best_n = gain, len(drafted)
            if chance < price:
                break
        return drafted[:best_n]

    def _lookup(self) -> tuple[int, int]:
        """Where the end of the text came before: the place after it, and the tokens that match."""
        ids, shortest, places = self.ids, self._shortest, self._places
        n = len(ids)
        if len(places) > MAX_INDEX:
            places.clear()
        for end in range(self._indexed, n):
            places[tuple(ids[end - shortest : end])] = end
        self._indexed = max(self._indexed, n)
        place = places.get(tuple(ids[n - shortest :]))
        if place is None:
            return 0, 0
        match = shortest
        while match < LONGEST_MATCH and match < place and ids[place - match - 1] == ids[-match - 1]:
            match += 1
        return place, match


class Speculation:
    """Looks like a Cache of one text to the loop: every call takes a token and gives its logits.

    drafted, accepted: tokens sent with others to be checked, and those of them that came.
    """

    def __init__(self, cache: Cache, drafter: Drafter, slope: float, *, measures: bool) -> None:
        self.cache = cache
        self.lengths = list(cache.lengths)  # without what is drafted and not drawn yet
        self.drafted = self.accepted = 0
        self._drafter = drafter
        self._slope = slope
        self._measures = measures
        self._step_s = 0.0  # a running mean of plain steps
        self._sent: list[int] = []
        self._logits: FloatArray = np.zeros((0, 0), np.float32)  # after each of them
        self._at = 0
        # Since drafting was last judged: tokens, and what they cost, in steps.
        self._tokens = 0
        self._cost = 0.0
        self._pause = FIRST_PAUSE
        self._paused = 0

    def decode(self, token_ids: Ids) -> FloatArray:
        """Add the token, the last of the text; logits (1, V), valid until the next call."""
        token_id = int(token_ids[0])
        self.lengths[0] += 1
        at = self._at
        if self._paused:
            self._paused -= 1
            return self._step(token_ids)
        self._drafter.learn(token_id)
        self._tokens += 1
        if at < len(self._sent) and self._sent[at] == token_id:
            self._at = at = at + 1
            self.accepted += 1
            return self._logits[at : at + 1]
        return self._next(token_id, token_ids)

    def _next(self, token_id: int, token_ids: Ids) -> FloatArray:
        """A token that was not drafted: a call of the model."""
        before = self.lengths[0] - 1
        if self.cache.lengths[0] != before:
            self.cache.truncate(0, before)
        self._sent, self._at = [], 0
        if self._tokens >= WINDOW and not self._pays():
            return self._step(token_ids)
        started = clock() if self._measures else 0.0
        limit = min(MAX_DRAFT, self.cache.capacity - before - 1)
        rate = max(1.0, self._tokens / self._cost) if self._tokens >= WINDOW // 4 else 1.0
        drafted = self._drafter.draft(limit, self._slope * rate) if limit > 0 else []
        if not drafted:
            logits = self._step(token_ids)
            self._cost += (clock() - started) / self._step_s if self._measures else 1.0 + DRAFTING
            return logits
        self._logits = self.cache.verify([token_id, *drafted])
        self._sent = drafted
        self.drafted += len(drafted)
        if self._measures and self._step_s:
            cost = min((clock() - started) / self._step_s, 8.0)
            self._cost += cost
            self._slope += 0.1 * (max(cost - 1.0, 0.0) / len(drafted) - self._slope)
        else:
            self._cost += 1.0 + DRAFTING + self._slope * len(drafted)
        return self._logits[:1]

    def _step(self, token_ids: Ids) -> FloatArray:
        if not self._measures:
            return self.cache.decode(token_ids)
        started = clock()
        logits = self.cache.decode(token_ids)
        elapsed = clock() - started
        if self._step_s:
            elapsed = min(elapsed, 3 * self._step_s)
            self._step_s += 0.1 * (elapsed - self._step_s)
        else:
            self._step_s = elapsed
        return logits

    def _pays(self) -> bool:
        """Whether drafts paid lately; if not, plain steps follow for a while."""
        pays = self._tokens >= MIN_GAIN * self._cost
        self._tokens, self._cost = 0, 0.0
        if pays:
            self._pause = FIRST_PAUSE
        else:
            self._paused = self._pause
            self._pause = min(2 * self._pause, MAX_PAUSE)
            self._drafter.forget()
        return pays

    @property
    def batch(self) -> int:
        return 1

    def keep_rows(self, rows: Sequence[int]) -> list[int]:
        """As Cache.keep_rows: the one row stays."""
        return self.cache.keep_rows(rows)

    def truncate(self, row: int, length: int) -> None:
        """As Cache.truncate; what is drafted is forgotten."""
        self.cache.truncate(row, length)
        self.lengths[0] = length
        self._sent, self._at = [], 0

    def append(self, row: int, ids: Ids) -> FloatArray:
        """As Cache.append, after truncate."""
        logits = self.cache.append(row, ids)
        self.lengths[0] = self.cache.lengths[0]
        return logits


def _at(chances: tuple[float, ...], i: int) -> float:
    """The chance i places from the shortest context; the nearest there is."""
    return chances[min(max(i, 0), len(chances) - 1)]
