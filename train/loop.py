"""Training: steps, evaluations, checkpoints, until the schedule ends or a signal asks.

A run can be killed at any instant and resumed to the same weights: what is random depends on (seed,
step, slot) or is restored, and what is on disk is whole. Knows nothing of the command line.

Try: `train(["data.txt"], TrainSettings(max_iters=100, preset="nano"))`.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import math
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from pico_edge.errors import PicoEdgeError
from pico_edge.train.board import open_board, require_tensorboard
from pico_edge.train.budget import fit_schedule
from pico_edge.train.checkpoint import (
    Checkpoint,
    library_versions,
    model_state,
    save_checkpoint,
)
from pico_edge.train.distributed import Workers, join, place
from pico_edge.train.evaluate import bits_per_byte, evaluate, sample_text
from pico_edge.train.folder import (
    RunPaths,
    check_old_run,
    clear_old_run,
    open_folder,
    remove_leftovers,
    run_paths,
    written_paths,
)
from pico_edge.train.lock import run_lock
from pico_edge.train.mfu import Meter, peak_memory_bytes
from pico_edge.train.optim import rate_at
from pico_edge.train.plot import LossPlot, draw_losses
from pico_edge.train.progress import cut, evaluation_line, progress_line
from pico_edge.train.report import (
    Reporter,
    TrainResult,
    append_metrics,
    append_sample,
    best_sample,
    cut_file,
    cut_metrics,
    one_line,
    quote,
    read_metrics,
)
from pico_edge.train.resume import Progress, resume_values
from pico_edge.train.settings import Recipe, TrainSettings, nearest_preset
from pico_edge.train.setup import Run, StrPath, set_up
from pico_edge.train.signals import StopRequest, stop_requests
from pico_edge.train.step import StepResult, divergence, memory_errors, train_step
from pico_edge.train.text import STDIN, find_files, spool_stdin
from pico_edge.train.verdict import Facts, SizedBy, Verdict, baseline, closing_lines, judge

# Besides every evaluation: what a power cut may cost at most, in a run whose evaluations are far
# apart.
SAVE_EVERY_S = 300.0
# The pace is that over so many evaluations: what passes by in less moves no schedule far.
PACE_EVALUATIONS = 3
# From the start of either part: enough to know how often each token occurs.
BASELINE_TOKENS = 1_000_000


def train(
    data: Sequence[StrPath],
    settings: TrainSettings,
    *,
    reporter: Reporter | None = None,
    started: float | None = None,
) -> TrainResult:
    """Train a model on text files and leave it in `settings.out`, its run folder beside it.

    data: files, folders, globs; "-" is standard input, kept in the run folder, where a resume finds
    it again. started: time.perf_counter() at the start of the process, from
    which minutes and elapsed_s count. Raises UsageError, ArtefactError (data or checkpoint
    refused), DivergedError, or PicoEdgeError (device missing, folder in use, out of memory, disk
    full at the end).
    """
    started = time.perf_counter() if started is None else started
    reporter = Reporter() if reporter is None else reporter
    flags = {"data": [str(path) for path in data], **dataclasses.asdict(settings)}
    with join(flags | library_versions(), device=settings.device) as workers:
        if not workers.is_first:
            reporter = Reporter(quiet=True)
        return _train(data, settings, reporter, started, workers)


def _train(
    data: Sequence[StrPath],
    settings: TrainSettings,
    reporter: Reporter,
    started: float,
    workers: Workers,
) -> TrainResult:
    paths = run_paths(settings.out)
    if settings.tensorboard:
        require_tensorboard()
    named = [path for path in data if path != STDIN]
    inputs: list[StrPath] = []
    if named or not data:  # a wrong name is refused before a folder is made
        inputs += find_files(named, exclude=written_paths(paths))
    if settings.val_data is not None:
        inputs += find_files([settings.val_data], exclude=written_paths(paths))
    if settings.ranks is not None:
        inputs.append(settings.ranks)
    with contextlib.ExitStack() as stack:
        workers.share(lambda: stack.enter_context(_claimed(paths, settings, inputs, reporter)))
        resume = settings.resume
        spooled = paths.stdin if resume else paths.new_stdin
        files = workers.share(
            lambda: [
                str(path) for path in spool_stdin(data, spooled, resume=resume, reporter=reporter)
            ]
        )
        run = set_up(files, settings, paths, reporter, started=started, workers=workers)
        workers.share(lambda: _prepare_records(run, reporter, resume=resume))
        loop = _Loop(run, reporter, started - run.progress.elapsed_s, settings)
        with stop_requests() as stop, memory_errors(run.trainer.recipe, run.trainer.model.config):
            loop.run_until_done(stop)
        loop.close()
        command = resume_command(data, settings)
        facts = _facts(run, settings, command)
        verdict = Verdict(*workers.share(lambda: [*judge(read_metrics(paths.metrics), facts)]))
        result = _result(run, stop, command, verdict)
        if workers.is_first:
            sample = best_sample(paths.samples)
            patience = run.trainer.recipe.patience
            for line in closing_lines(result, verdict, patience=patience, sample=sample):
                reporter.say(line)
            # After the lines: who pressed Ctrl-C waits for these.
            with loop.disk(paths.image, final=False):
                draw_losses(paths.metrics, paths.image)
    return result


@contextlib.contextmanager
def _claimed(
    paths: RunPaths, settings: TrainSettings, inputs: Sequence[StrPath], reporter: Reporter
) -> Iterator[None]:
    """The run folder, ours alone for the time of the block, and fit to begin in."""
    open_folder(paths, resume=settings.resume, force=settings.force, inputs=inputs)
    with run_lock(paths.folder) as dead:
        if dead is not None:
            reporter.say(f"{paths.folder}: took over from {dead}, which no longer runs")
        check_old_run(paths, resume=settings.resume, force=settings.force)
        remove_leftovers(paths)
        yield


def _prepare_records(run: Run, reporter: Reporter, *, resume: bool) -> None:
    """Let the files beside the checkpoints say what this run has done up to its iteration."""
    if not resume:
        clear_old_run(run.paths)
        if run.paths.new_stdin.exists():
            os.replace(run.paths.new_stdin, run.paths.stdin)
        return
    cut_metrics(run.paths.metrics, run.progress.iter)
    cut_file(run.paths.samples, run.progress.samples_bytes)
    if run.progress.finished is not None:
        reporter.say("this run is finished: --init-from trains on from its model")


class _Loop:
    """The loop and what it remembers between steps. epoch: perf_counter at elapsed_s 0."""

    def __init__(self, run: Run, reporter: Reporter, epoch: float, settings: TrainSettings) -> None:
        self.run = run
        self.reporter = reporter
        self.epoch = epoch
        self.last_step = StepResult(math.nan, math.nan)
        self.rate = 0.0
        self.stepping_s = 0.0  # since the last evaluation, in this process
        self.steps = 0  # the same
        self.val: tuple[float, float] | None = None  # last held-out loss, bits per byte
        self.tokens_per_second = 0.0  # at the last evaluation
        # (iteration, clock) at the start and at the last evaluations, kept by rank 0
        self.marks: collections.deque[tuple[int, float]] = collections.deque(
            maxlen=PACE_EVALUATIONS
        )
        self.meter = Meter(run.trainer)
        self.plot = LossPlot(run.paths.metrics, run.paths.image)
        self.board = (
            open_board(run.paths.tensorboard, step=run.progress.iter)
            if settings.tensorboard and run.trainer.workers.is_first
            else None
        )
        self.saved_at = time.monotonic()
        self.saved_iter = run.progress.iter if run.progress.iter else None

    def run_until_done(self, stop: StopRequest) -> None:
        """Step, evaluate and save until the run is finished or a stop is requested."""
        trainer, progress = self.run.trainer, self.run.progress
        self.marks.append((progress.iter, time.perf_counter()))
        while progress.finished is None:
            recipe = trainer.recipe
            # Asked for once per step, so that all ranks leave at the same one.
            signum = trainer.workers.agreed(stop.signum)
            if signum is not None:
                stop.signum = signum
                if self.saved_iter != progress.iter:
                    self._save_last(final=True)
                return
            step_begin = time.perf_counter()
            self.rate = rate_at(recipe, progress.iter)
            self.last_step = train_step(trainer, progress.iter, self.rate)
            self.stepping_s += time.perf_counter() - step_begin
            self.steps += 1
            progress.iter += 1
            progress.train_loss_sum += self.last_step.loss
            progress.train_loss_count += 1
            per_iter_s = self._per_iter_s()
            ends = progress.iter == recipe.max_iters
            if ends or progress.iter % recipe.eval_interval == 0:
                self._evaluate(final=ends)
            elif recipe.budget_s and trainer.workers.first_says(self._is_overdue()):
                # Evaluations may be far apart on a machine that has become slow.
                trainer.recipe = trainer.workers.share(
                    self._lay_anew, to_plain=Recipe.to_dict, from_plain=Recipe.from_dict
                )
                self._save_last(final=False)
            elif time.monotonic() - self.saved_at > SAVE_EVERY_S:
                self._save_last(final=False)
            left_s = per_iter_s * (trainer.recipe.max_iters - progress.iter)
            self.reporter.progress(functools.partial(self._progress_line, left_s))

    def _per_iter_s(self) -> float:
        """Seconds per iteration since the oldest mark, evaluations and saves included."""
        first, begin = self.marks[0]
        return (time.perf_counter() - begin) / (self.run.progress.iter - first)

    def _fitted(self) -> Recipe:
        """The recipe as the time left asks for, by the clock of this rank."""
        return fit_schedule(
            self.run.trainer.recipe,
            step=self.run.progress.iter,
            elapsed_s=time.perf_counter() - self.epoch,
            per_iter_s=self._per_iter_s(),
        )

    def _is_overdue(self) -> bool:
        """Whether the time is over and too much is left to do."""
        recipe = self.run.trainer.recipe
        over = time.perf_counter() - self.epoch > recipe.budget_s
        return over and self._fitted().max_iters < recipe.max_iters

    def _lay_anew(self) -> Recipe:
        """Fit the schedule to the time left, on rank 0; to be saved before the next step."""
        trainer = self.run.trainer
        before, trainer.recipe = trainer.recipe.max_iters, self._fitted()
        now = trainer.recipe.max_iters
        if now != before:
            pace = "slower" if now < before else "faster"
            self.reporter.say(f"schedule: {before} -> {now} iterations, {pace} than planned")
        return trainer.recipe

    def _progress_line(self, left_s: float, columns: int | None) -> str:
        progress, trainer = self.run.progress, self.run.trainer
        speed = self.tokens_per_second
        if self.steps:
            speed = self.steps * trainer.tokens_per_iter / self.stepping_s
        val_loss, val_bpb = self.val or (None, None)
        return progress_line(
            step=progress.iter,
            max_iters=trainer.recipe.max_iters,
            loss=self.last_step.loss,
            val_loss=val_loss,
            bits_per_byte=val_bpb,
            tokens_per_second=speed,
            utilization=self.meter.text(speed),
            memory_bytes=peak_memory_bytes(trainer.device),
            left_s=left_s,
            columns=columns,
        )

    def close(self) -> None:
        """End what stays open between evaluations."""
        if self.board is not None:
            self.board.close()

    def _evaluate(self, *, final: bool) -> None:
        """Measure the held-out loss, on all ranks; rank 0 does the rest and tells the others."""
        run, progress = self.run, self.run.progress
        val_loss = evaluate(run.trainer, run.data)
        if not math.isfinite(val_loss):
            found = f"held-out loss {val_loss}"
            raise divergence(run.trainer, progress.iter - 1, self.rate, found)
        known, run.trainer.recipe = run.trainer.workers.share(
            lambda: (self._record(val_loss, final=final), run.trainer.recipe),
            to_plain=lambda known: [dataclasses.asdict(known[0]), known[1].to_dict()],
            from_plain=lambda values: (Progress(**values[0]), Recipe.from_dict(values[1])),
        )
        vars(progress).update(vars(known))

    def _record(self, val_loss: float, *, final: bool) -> Progress:
        """Note an evaluation, keep the model if it is the best, save the state."""
        run, progress, recipe = self.run, self.run.progress, self.run.trainer.recipe
        val_bpb = bits_per_byte(val_loss, run.data)
        train_loss = progress.train_loss_sum / progress.train_loss_count
        tokens_per_second = self.steps * run.trainer.tokens_per_iter / self.stepping_s
        progress.elapsed_s = time.perf_counter() - self.epoch
        progress.train_loss_sum, progress.train_loss_count = 0.0, 0
        self.steps, self.stepping_s = 0, 0.0
        self.val, self.tokens_per_second = (val_loss, val_bpb), tokens_per_second
        is_best = progress.best_val_loss is None or val_loss < progress.best_val_loss
        columns = self.reporter.columns
        self.reporter.say(
            evaluation_line(
                step=progress.iter,
                max_iters=recipe.max_iters,
                train_loss=train_loss,
                val_loss=val_loss,
                bits_per_byte=val_bpb,
                tokens_per_second=tokens_per_second,
                elapsed_s=progress.elapsed_s,
                is_best=is_best,
                columns=columns,
            )
        )
        seed = (recipe.seed + progress.iter) % 2**63
        text = sample_text(run.trainer.model, run.tokenizer, run.sample_prompt, seed=seed)
        self.reporter.say(cut("  " + one_line(text), columns))
        metrics = {
            "iter": progress.iter,
            "tokens": progress.iter * run.trainer.tokens_per_iter,
            "elapsed_s": progress.elapsed_s,
            "train_loss": train_loss,
            "val_loss": val_loss,
            "val_bits_per_byte": val_bpb,
            "learning_rate": self.rate,
            # Not finite where float16 has just found the limit of its loss scale.
            "grad_norm": norm if math.isfinite(norm := self.last_step.grad_norm) else None,
            "tokens_per_second": tokens_per_second,
        }
        paths = run.paths
        with self.disk(paths.metrics, final=final):
            append_metrics(paths.metrics, metrics)
        with self.disk(paths.samples, final=final):
            append_sample(paths.samples, progress.iter, text, val_loss=val_loss, is_best=is_best)
            progress.samples_bytes = paths.samples.stat().st_size
        progress.evaluations_since_best += 1
        if is_best:
            # Where this save fails, a later model that beats the one on disk must still replace it.
            with self.disk(paths.out, final=final):
                save_checkpoint(paths.out, self._checkpoint(train_loss, val_loss, val_bpb))
                progress.best_iter, progress.best_val_loss = progress.iter, val_loss
                progress.best_val_bits_per_byte = val_bpb
                progress.evaluations_since_best = 0
        if final:
            progress.finished = "max_iters"
        elif recipe.patience and progress.evaluations_since_best >= recipe.patience:
            progress.finished = "patience"
        else:
            # Resumed between two evaluations, one on few steps would weigh too much.
            resumed = progress.iter - self.marks[0][0] < recipe.eval_interval
            if resumed or self._lay_anew() is not recipe:
                self.marks.clear()  # what was before says little of the pace from now on
            self.marks.append((progress.iter, time.perf_counter()))
        self._save_last(train_loss, val_loss, val_bpb, final=progress.finished is not None)
        if self.board is not None:
            with self.disk(paths.tensorboard, final=False):
                self.board.write(metrics, text)
        if progress.finished is None:
            with self.disk(paths.image, final=False):
                self.plot.refresh()
        return progress

    def _save_last(
        self,
        train_loss: float | None = None,
        val_loss: float | None = None,
        val_bpb: float | None = None,
        *,
        final: bool,
    ) -> None:
        """Save the resumable state; the losses are given where this iteration was evaluated."""
        run = self.run
        if not run.trainer.workers.is_first:
            return
        run.progress.elapsed_s = time.perf_counter() - self.epoch
        resume = resume_values(run.trainer, run.progress, compiled=run.compiled)
        checkpoint = self._checkpoint(train_loss, val_loss, val_bpb)
        with self.disk(run.paths.last, final=final):
            save_checkpoint(
                run.paths.last,
                dataclasses.replace(checkpoint, resume=resume),
                previous=run.paths.previous,
            )
            self.saved_iter = run.progress.iter
        self.saved_at = time.monotonic()

    def _checkpoint(
        self, train_loss: float | None, val_loss: float | None, val_bpb: float | None
    ) -> Checkpoint:
        run = self.run
        return Checkpoint(
            config=run.trainer.model.config,
            tokenizer=run.tokenizer,
            model=model_state(run.trainer.model),
            held_out=run.data.held_out,
            iter=run.progress.iter,
            tokens=run.progress.iter * run.trainer.tokens_per_iter,
            train_loss=train_loss,
            val_loss=val_loss,
            val_bits_per_byte=val_bpb,
            settings=run.source | run.trainer.recipe.to_dict(),
            data=run.data.fingerprint,
            versions=library_versions(),
            ngrams=run.ngrams,
        )

    @contextlib.contextmanager
    def disk(self, path: Path, *, final: bool) -> Iterator[None]:
        """A write that fails is a warning while another one will come, else the end of the run."""
        try:
            yield
        except OSError as error:
            why = f"{path} could not be saved: {error.strerror or error}"
            if final:
                paths = self.run.paths
                saved = paths.last.exists() or paths.previous.exists()
                advice = "what was saved before is whole; make room, then --resume"
                if not saved:
                    advice = "nothing was saved before; make room, and start again"
                raise PicoEdgeError(f"{why}: {advice}") from error
            self.reporter.say(f"warning: {why}: training goes on")


def resume_command(data: Sequence[StrPath], settings: TrainSettings) -> str:
    """The command that continues this run exactly. Example: pico-edge train data.txt --resume."""
    words = [*_launcher(), "train", *(_as_argument(str(path)) for path in data)]
    # What the checkpoint does not decide: where things are, and what the device does.
    for name in ("out", "val_data", "device", "dtype", "threads", "sample_prompt"):
        value = getattr(settings, name)
        if value != getattr(TrainSettings, name):
            words += ["--" + name.replace("_", "-"), str(value)]
    if settings.compile is not None:
        words.append("--compile" if settings.compile else "--no-compile")
    if settings.tensorboard:
        words.append("--tensorboard")
    return " ".join(quote(word) for word in [*words, "--resume"])


def _as_argument(path: str) -> str:
    """A path that no parser takes for an option. Example: "-a.txt" -> "./-a.txt"."""
    return f"./{path}" if path.startswith("-") and path != STDIN else path


def _launcher() -> list[str]:
    where = place()
    if where.world_size == 1:
        return ["pico-edge"]
    machines = where.world_size // max(1, where.local_world_size)
    words = ["torchrun", *(["--nnodes", str(machines)] if machines > 1 else [])]
    return [*words, "--nproc-per-node", str(where.local_world_size), "-m", "pico_edge"]


def _facts(run: Run, settings: TrainSettings, command: str) -> Facts:
    """What the verdict needs beside the evaluations."""
    recipe, config, data = run.trainer.recipe, run.trainer.model.config, run.data
    bytes_per_token = data.n_val_bytes / len(data.val)
    val = data.val[:BASELINE_TOKENS]
    return Facts(
        stopped=run.progress.finished or "signal",
        preset=nearest_preset(config),
        dropout=config.dropout,
        sized_by=_sized_by(settings),
        minutes=recipe.budget_s / 60 if recipe.budget_s else None,
        max_iters=recipe.max_iters,
        tokens_per_epoch=len(data.train),
        train_bytes=round(len(data.train) * bytes_per_token),
        baseline_bits_per_byte=baseline(
            data.train[:BASELINE_TOKENS],
            val,
            n_vocab=run.tokenizer.n_vocab,
            n_val_bytes=round(len(val) * bytes_per_token),
        ),
        learning_rate=recipe.learning_rate,
        resume_command=command,
    )


def _sized_by(settings: TrainSettings) -> SizedBy:
    if settings.init_from is not None:
        return "checkpoint"
    if settings.has_target:
        return "target"
    shape = (settings.n_layer, settings.n_head, settings.n_embd)
    return "preset" if shape == (None, None, None) else "flags"


def _result(run: Run, stop: StopRequest, command: str, verdict: Verdict) -> TrainResult:
    progress = run.progress
    return TrainResult(
        file=str(run.paths.out) if progress.best_iter and run.paths.out.exists() else None,
        run_folder=str(run.paths.folder),
        stopped=progress.finished or "signal",
        signal=None if progress.finished else stop.signum,
        iter=progress.iter,
        max_iters=run.trainer.recipe.max_iters,
        tokens=progress.iter * run.trainer.tokens_per_iter,
        parameters=run.trainer.model.num_parameters(),
        elapsed_s=progress.elapsed_s,
        best_iter=progress.best_iter,
        val_loss=progress.best_val_loss,
        val_bits_per_byte=progress.best_val_bits_per_byte,
        resume_command=command,
        verdict=verdict.word,
        advice=verdict.advice,
    )
