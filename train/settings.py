"""What a training run is asked for and what it then does: flags, presets, recipe.

`TrainSettings` holds the flags of `pico-edge train` (None: chosen for the user), `PRESETS` the
values that go with a size, `Recipe` what the steps of one run follow; a Recipe is stored with the
run and stays in force when it is resumed. Knows nothing of torch, files or models, so the command
line reads its defaults here.

Try: `TrainSettings(preset="nano").model_config("nano", vocab_size=272)`.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from pico_edge.config import GPTConfig
from pico_edge.errors import ArtefactError, UsageError
from pico_edge.tokenizer import SimpleTokenizer

DEFAULT_MINUTES = 10.0
# Peak of a fine-tune against that of a fresh model: weights that are good already want small steps.
FINE_TUNE_RATE = 0.1
# Evaluations in a row without a new best: fewer end runs whose loss is only noisy.
PATIENCE = 8


@dataclass(frozen=True)
class Preset:
    """A model size and the training values that go with it; a batch is of block_size-token windows.

    batch_size_gpu: on CUDA and MPS, where a batch of the CPU's size would leave the device idle.
    learning_rate: the peak with AdamW; muon_learning_rate: with Muon. optimizer: the default one.
    """

    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    dropout: float
    batch_size: int
    batch_size_gpu: int
    grad_accum: int
    learning_rate: float
    muon_learning_rate: float
    optimizer: str
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.99  # small batches: a longer memory of the squared gradient than GPT-2's 0.95
    grad_clip: float = 1.0
    momentum: float = 0.9  # of Muon; 0.95 learns slower in runs of up to some thousand iterations


PRESETS = {
    # A text for nano is read hundreds of times in ten minutes: only dropout keeps it from being
    # learnt by heart. From micro on, ten minutes of a laptop are a few passes at most.
    # Muon's rates: 400 iterations of 4 x 128 on tiny shakespeare end at 1.910 nats with 8e-3, 1.884
    # with 1.6e-2, 1.902 with 2.4e-2. Wider models want less; from mini on not measured.
    "nano": Preset(4, 4, 128, 64, 0.2, 16, 64, 1, 2e-3, 1.6e-2, "muon"),
    "micro": Preset(4, 4, 256, 128, 0.0, 12, 64, 1, 1e-3, 1e-2, "muon"),
    "mini": Preset(6, 6, 384, 256, 0.0, 12, 64, 1, 1e-3, 6e-3, "muon"),
    "small": Preset(8, 8, 512, 512, 0.0, 8, 32, 1, 6e-4, 4e-3, "muon"),
    "gpt2": Preset(12, 12, 768, 1024, 0.0, 4, 12, 8, 6e-4, 2e-3, "muon", beta2=0.95),
}
# Text of fewer bytes than this gets that preset; anything larger gets "small".
PRESET_BELOW_BYTES = {"nano": 100_000, "micro": 2_000_000, "mini": 50_000_000}

TOKENIZERS = ("simple", "bpe", "gpt2")
OPTIMIZERS = ("adamw", "muon")
DEVICES = ("auto", "cpu", "cuda", "mps")
DTYPES = ("auto", "float32", "bfloat16", "float16")
ARCHITECTURE = ("n_layer", "n_head", "n_embd", "block_size", "bias", "gelu")


@dataclass(frozen=True)
class TrainSettings:
    """The flags of `pico-edge train`; None means chosen from the data, the device and the time.

    minutes is wall-clock time from the start of the process, val_fraction the part of the text, at
    its end, that training never sees; the other units are those of `Recipe`.
    Raises UsageError (a ValueError) that names the field.
    """

    out: str = "ckpt.pt"
    tokenizer: str | None = None
    vocab_size: int | None = None
    ranks: str | None = None
    preset: str | None = None
    target_bytes: int | None = None
    target_tokens_per_second: float | None = None
    minutes: float | None = None
    max_iters: int | None = None
    n_layer: int | None = None
    n_head: int | None = None
    n_embd: int | None = None
    block_size: int | None = None
    dropout: float | None = None
    bias: bool | None = None
    gelu: str | None = None
    batch_size: int | None = None
    grad_accum: int | None = None
    learning_rate: float | None = None
    min_lr: float | None = None
    warmup_iters: int | None = None
    weight_decay: float | None = None
    beta1: float | None = None
    beta2: float | None = None
    grad_clip: float | None = None
    optimizer: str | None = None
    val_data: str | None = None
    val_fraction: float = 0.1
    eval_interval: int | None = None
    eval_iters: int | None = None
    sample_prompt: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    compile: bool | None = None
    threads: int | None = None
    seed: int = 1337
    resume: bool = False
    init_from: str | None = None
    reinit_embeddings: bool = False
    force: bool = False
    encoding: str | None = None
    text_field: str = "text"
    tensorboard: bool = False

    def __post_init__(self) -> None:
        for name in ("max_iters", "n_layer", "n_head", "n_embd", "block_size", "batch_size"):
            _check_number(name, getattr(self, name), 1, whole=True)
        for name in ("grad_accum", "eval_interval", "eval_iters", "threads"):
            _check_number(name, getattr(self, name), 1, whole=True)
        _check_number("warmup_iters", self.warmup_iters, 0, whole=True)
        _check_number("seed", self.seed, 0, below=2**63, whole=True)
        _check_number(
            "vocab_size", self.vocab_size, SimpleTokenizer.n_vocab, below=2**24, whole=True
        )
        _check_number("target_bytes", self.target_bytes, 1, whole=True)
        for name in ("minutes", "learning_rate", "target_tokens_per_second"):
            _check_number(name, getattr(self, name), 0, exclusive=True)
        for name in ("min_lr", "weight_decay", "grad_clip"):
            _check_number(name, getattr(self, name), 0)
        for name in ("dropout", "beta1", "beta2"):
            _check_number(name, getattr(self, name), 0, below=1)
        _check_number("val_fraction", self.val_fraction, 0, below=1, exclusive=True)
        _check_choice("tokenizer", self.tokenizer, TOKENIZERS)
        _check_choice("preset", self.preset, tuple(PRESETS))
        _check_choice("gelu", self.gelu, ("tanh", "erf"))
        _check_choice("optimizer", self.optimizer, OPTIMIZERS)
        _check_choice("device", self.device, DEVICES)
        _check_choice("dtype", self.dtype, DTYPES)
        for name in ("val_data", "ranks", "init_from"):
            if getattr(self, name) == "":
                raise UsageError(f"{name} is empty: expected the name of a file")
        if self.sample_prompt is not None and not _is_text(self.sample_prompt):
            raise UsageError(f"sample_prompt is {self.sample_prompt!r}: expected text in UTF-8")
        if self.val_data is not None and self.val_fraction != TrainSettings.val_fraction:
            raise UsageError("val_data and val_fraction are both given: one says what is held out")
        if self.minutes is not None and self.max_iters is not None:
            raise UsageError("minutes and max_iters are both given: the schedule is laid over one")
        if self.ranks is not None and self.tokenizer != "gpt2":
            raise UsageError("ranks is given without tokenizer gpt2: add --tokenizer gpt2")
        if self.resume and self.force:
            raise UsageError("resume and force are both given: continue the run, or start over")
        if self.resume and self.init_from is not None:
            raise UsageError("resume and init_from are both given: continue the run, or start anew")
        if self.reinit_embeddings and self.init_from is None:
            raise UsageError("reinit_embeddings is given without init_from: a new model needs none")
        if self.init_from is not None and self.preset is not None:
            raise UsageError("preset is given with init_from: the checkpoint decides it")
        for name in ("tokenizer", "vocab_size"):
            asked = self.init_from is not None and getattr(self, name) is not None
            if asked and not self.reinit_embeddings:
                raise UsageError(
                    f"{name} is given with init_from: the checkpoint decides it; another one needs "
                    "a fresh token table: add --reinit-embeddings"
                )
        for name in ("preset", "n_layer", "n_head", "n_embd", "init_from"):
            if self.has_target and getattr(self, name) is not None:
                raise UsageError(f"{name} is given with a target for the device: one decides")
        if self.preset is not None:
            self.model_config(self.preset, vocab_size=272)

    @property
    def time_s(self) -> float:
        """The time a run may take where no number of iterations is given."""
        return 60.0 * (DEFAULT_MINUTES if self.minutes is None else self.minutes)

    @property
    def has_target(self) -> bool:
        """Whether the size of the model follows from what the device can take."""
        return self.target_bytes is not None or self.target_tokens_per_second is not None

    def model_config(self, preset: str, *, vocab_size: int) -> GPTConfig:
        """The shape of the model: that of a preset with every flag given put over it."""
        values = dataclasses.asdict(PRESETS[preset])
        fields = [field.name for field in dataclasses.fields(GPTConfig)]
        chosen = {name: values[name] for name in fields if name in values}
        given = {name: getattr(self, name) for name in (*ARCHITECTURE, "dropout")}
        chosen |= {name: value for name, value in given.items() if value is not None}
        return GPTConfig(vocab_size=vocab_size, **chosen)

    def recipe(
        self,
        preset: str,
        *,
        gpu: bool,
        max_iters: int,
        tokens_per_epoch: int,
        block_size: int,
    ) -> Recipe:
        """What the steps of a new run follow. tokens_per_epoch: the training part, in tokens.

        Raises UsageError where flags contradict each other.
        """
        values = PRESETS[preset]
        batch_size = self.batch_size or (values.batch_size_gpu if gpu else values.batch_size)
        grad_accum = self.grad_accum or values.grad_accum
        optimizer, rate = self.optimizer or values.optimizer, self.learning_rate
        if rate is None:
            rate = values.muon_learning_rate if optimizer == "muon" else values.learning_rate
            # Fresh embeddings need the full rate: 2.69 against 3.31 bits per byte after 300
            # iterations of a 3 x 64 model.
            fine_tunes = self.init_from is not None and not self.reinit_embeddings
            rate *= FINE_TUNE_RATE if fine_tunes else 1.0
        min_lr = 0.0 if self.min_lr is None else self.min_lr
        if min_lr > rate:
            raise UsageError(f"min_lr is {min_lr}: expected at most learning_rate, which is {rate}")
        warmup = min(100, max_iters // 20) if self.warmup_iters is None else self.warmup_iters
        interval = self.eval_interval or eval_interval(
            max_iters, tokens_per_epoch, batch_size * grad_accum * block_size
        )
        return Recipe(
            seed=self.seed,
            batch_size=batch_size,
            grad_accum=grad_accum,
            max_iters=max_iters,
            learning_rate=rate,
            min_lr=min_lr,
            warmup_iters=warmup,
            weight_decay=_given(self.weight_decay, values.weight_decay),
            beta1=_given(self.beta1, values.beta1),
            beta2=_given(self.beta2, values.beta2),
            grad_clip=_given(self.grad_clip, values.grad_clip),
            optimizer=optimizer,
            momentum=values.momentum,
            eval_interval=interval,
            # 0.15: an evaluation costs a third of training, so at most some 5 % of the time.
            eval_iters=self.eval_iters or max(16, min(64, round(0.15 * interval * grad_accum))),
            # Whoever names a number of iterations gets that number.
            patience=PATIENCE if self.max_iters is None else 0,
            budget_s=self.time_s if self.max_iters is None else 0.0,
            decay_iter=warmup,
            decay_rate=rate,
        )


@dataclass(frozen=True)
class Recipe:
    """What the steps of one run follow; stored in `last.pt` and unchanged by a resume.

    One iteration is one optimizer step over grad_accum x batch_size windows. eval_iters: most
    batches of one evaluation. patience: evaluations in a row without a new best that end the run,
    0: never. grad_clip 0: no clipping. learning_rate is the peak. budget_s: the time asked for, 0
    where iterations were. From decay_iter on the rate falls from decay_rate; at first these are
    warmup_iters and learning_rate, and `budget.fit_schedule` may change them with max_iters.
    """

    seed: int
    batch_size: int
    grad_accum: int
    max_iters: int
    learning_rate: float
    min_lr: float
    warmup_iters: int
    weight_decay: float
    beta1: float
    beta2: float
    grad_clip: float
    optimizer: str
    momentum: float
    eval_interval: int
    eval_iters: int
    patience: int
    budget_s: float
    decay_iter: int
    decay_rate: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for the checkpoint."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: object) -> Recipe:
        """The inverse of `to_dict`. ArtefactError for fields missing, unknown or mistyped."""
        fields = {field.name: field.type for field in dataclasses.fields(cls)}
        if isinstance(values, dict) and "budget_s" not in values:
            # From when a schedule was never laid anew.
            decay = {"decay_iter": "warmup_iters", "decay_rate": "learning_rate"}
            old = {name: values[key] for name, key in decay.items() if key in values}
            values = {"budget_s": 0.0} | old | values
        if not isinstance(values, dict) or values.keys() != fields.keys():
            raise ArtefactError(f"training recipe: expected the fields {sorted(fields)}")
        for name, kind in fields.items():
            if type(values[name]).__name__ != kind:
                raise ArtefactError(f"training recipe: {name} is {values[name]!r}: expected {kind}")
        return cls(**values)


def _is_text(text: str) -> bool:
    """Whether it holds no lone surrogates, as arguments do whose bytes the locale cannot read."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def choose_preset(n_bytes: int) -> str:
    """The size for a text of so many bytes. Example: 1_115_394 -> "micro"."""
    for name, limit in PRESET_BELOW_BYTES.items():
        if n_bytes < limit:
            return name
    return "small"


def nearest_preset(config: GPTConfig) -> str:
    """The preset whose training values fit a given shape best: the one nearest in width."""
    return min(PRESETS, key=lambda name: abs(math.log(PRESETS[name].n_embd / config.n_embd)))


def eval_interval(max_iters: int, tokens_per_epoch: int, tokens_per_iter: int) -> int:
    """Iterations between evaluations: 20 to a long run, and at most 5 passes over a small text.

    A small text is learnt by heart long before a twentieth of the time is over; at least 25
    iterations keep the noise of one evaluation from ending the run. Example: (10_000, 3_000, 1_024)
    -> 25.
    """
    five_passes = 5 * tokens_per_epoch // tokens_per_iter
    return min(max_iters, max(10, min(max_iters // 20, max(25, five_passes))))


def _given(value: float | None, default: float) -> float:
    return default if value is None else value


def _check_number(
    name: str,
    value: float | None,
    least: float,
    *,
    below: float = math.inf,
    whole: bool = False,
    exclusive: bool = False,
) -> None:
    if value is None:
        return
    kind = "a whole number" if whole else "a number"
    bound = f"above {least}" if exclusive else f"of at least {least}"
    bound += f" and below {below}" if below < math.inf else ""
    right_kind = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    # Written so that nan fails it.
    if not (right_kind and least <= value < below) or (exclusive and value == least):
        raise UsageError(f"{name} is {value!r}: expected {kind} {bound}")


def _check_choice(name: str, value: str | None, choices: tuple[str, ...]) -> None:
    if value is not None and value not in choices:
        raise UsageError(f"{name} is {value!r}: expected one of {', '.join(choices)}")
