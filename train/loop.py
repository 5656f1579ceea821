"""Training: steps, evaluations, checkpoints, until the schedule ends or a signal asks.

A run can be killed at any instant and resumed to the same weights: what is random depends on (seed,
step, slot) or is restored, and what is on disk is whole. Knows nothing of the command line.

Try: `train(["data.txt"], TrainSettings(max_iters=100, preset="nano"))`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from pico_edge.errors import PicoEdgeError
from pico_edge.train.checkpoint import (
    Checkpoint,
    library_versions,
    model_state,
    save_checkpoint,
)
from pico_edge.train.evaluate import bits_per_byte, evaluate, sample_text
from pico_edge.train.folder import (
    check_old_run,
    clear_old_run,
    open_folder,
    remove_leftovers,
    run_paths,
)
from pico_edge.train.lock import run_lock
from pico_edge.train.optim import learning_rate
from pico_edge.train.report import (
    Reporter,
    TrainResult,
    append_metrics,
    append_sample,
    cut_file,
    cut_metrics,
    draw_losses,
    duration,
    one_line,
    quote,
    verdict,
)
from pico_edge.train.resume import resume_values
from pico_edge.train.settings import TrainSettings
from pico_edge.train.setup import Run, StrPath, set_up
from pico_edge.train.signals import StopRequest, stop_requests
from pico_edge.train.step import StepResult, divergence, memory_errors, train_step
from pico_edge.train.text import STDIN, find_files, spool_stdin

# Besides every evaluation: what a power cut may cost at most, in a run whose evaluations are far
# apart.
SAVE_EVERY_S = 300.0


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
    paths = run_paths(settings.out)
    named = [path for path in data if path != STDIN]
    if named or not data:
        find_files(named)  # a wrong name is refused before a folder is made
    open_folder(paths, resume=settings.resume, force=settings.force)
    with run_lock(paths.folder) as dead:
        if dead is not None:
            reporter.say(f"{paths.folder}: took over from {dead}, which no longer runs")
        check_old_run(paths, resume=settings.resume, force=settings.force)
        remove_leftovers(paths)
        files = spool_stdin(data, paths.stdin, resume=settings.resume, reporter=reporter)
        run = set_up(files, settings, paths, reporter, started=started)
        if settings.resume:
            cut_metrics(paths.metrics, run.progress.iter)
            cut_file(paths.samples, run.progress.samples_bytes)
            if run.progress.finished is not None:
                reporter.say("this run is finished: --init-from trains on from its model")
        else:
            clear_old_run(paths)
        loop = _Loop(run, reporter, started - run.progress.elapsed_s)
        with stop_requests() as stop, memory_errors(run.trainer.recipe, run.trainer.model.config):
            loop.run_until_done(stop)
        result = _result(run, stop, resume_command(data, settings))
        if result.stopped != "signal":
            draw_losses(paths.metrics, paths.image)
    for line in verdict(result, patience=run.trainer.recipe.patience):
        reporter.say(line)
    return result


class _Loop:
    """The loop and what it remembers between steps. epoch: perf_counter at elapsed_s 0."""

    def __init__(self, run: Run, reporter: Reporter, epoch: float) -> None:
        self.run = run
        self.reporter = reporter
        self.epoch = epoch
        self.last_step = StepResult(math.nan, math.nan)
        self.rate = 0.0
        self.stepping_s = 0.0  # since the last evaluation, in this process
        self.steps = 0  # the same
        self.saved_at = time.monotonic()

    def run_until_done(self, stop: StopRequest) -> None:
        """Step, evaluate and save until the run is finished or a stop is requested."""
        trainer, progress, recipe = self.run.trainer, self.run.progress, self.run.trainer.recipe
        first, begin = progress.iter, time.perf_counter()
        while progress.finished is None and stop.signum is None:
            step_begin = time.perf_counter()
            self.rate = learning_rate(
                progress.iter,
                peak=recipe.learning_rate,
                min_lr=recipe.min_lr,
                warmup_iters=recipe.warmup_iters,
                max_iters=recipe.max_iters,
            )
            self.last_step = train_step(trainer, progress.iter, self.rate)
            self.stepping_s += time.perf_counter() - step_begin
            self.steps += 1
            progress.iter += 1
            progress.train_loss_sum += self.last_step.loss
            progress.train_loss_count += 1
            ends = progress.iter == recipe.max_iters
            if ends or progress.iter % recipe.eval_interval == 0:
                self._evaluate(final=ends)
            elif stop.signum is not None or time.monotonic() - self.saved_at > SAVE_EVERY_S:
                self._save_last(final=stop.signum is not None)
            done = progress.iter - first
            left_s = (time.perf_counter() - begin) / done * (recipe.max_iters - progress.iter)
            self.reporter.progress(self._progress_line(left_s))

    def _progress_line(self, left_s: float) -> str:
        progress, trainer = self.run.progress, self.run.trainer
        speed = self.steps * trainer.tokens_per_iter / self.stepping_s if self.steps else 0.0
        best = progress.best_val_loss
        return (
            f"iter {progress.iter}/{trainer.recipe.max_iters} | loss {self.last_step.loss:.3f}"
            + (f" | best held out {best:.3f}" if best is not None else "")
            + (f" | {speed:,.0f} tokens/s" if speed else "")
            + f" | {duration(left_s)} left"
        )

    def _evaluate(self, *, final: bool) -> None:
        """Measure the held-out loss, note it, keep the model if it is the best, save the state."""
        run, progress, recipe = self.run, self.run.progress, self.run.trainer.recipe
        val_loss = evaluate(run.trainer, run.data)
        if not math.isfinite(val_loss):
            found = f"held-out loss {val_loss}"
            raise divergence(run.trainer, progress.iter - 1, self.rate, found)
        val_bpb = bits_per_byte(val_loss, run.data)
        train_loss = progress.train_loss_sum / progress.train_loss_count
        tokens_per_second = self.steps * run.trainer.tokens_per_iter / self.stepping_s
        progress.elapsed_s = time.perf_counter() - self.epoch
        progress.train_loss_sum, progress.train_loss_count = 0.0, 0
        self.steps, self.stepping_s = 0, 0.0
        is_best = progress.best_val_loss is None or val_loss < progress.best_val_loss
        self.reporter.say(
            f"iter {progress.iter}/{recipe.max_iters} | train {train_loss:.4f} | held out "
            f"{val_loss:.4f} | {val_bpb:.3f} bits/byte | {tokens_per_second:,.0f} tokens/s | "
            f"{duration(progress.elapsed_s)}{' | best' if is_best else ''}"
        )
        seed = (recipe.seed + progress.iter) % 2**63
        text = sample_text(run.trainer.model, run.tokenizer, run.sample_prompt, seed=seed)
        self.reporter.say("  " + one_line(text))
        metrics = {
            "iter": progress.iter,
            "tokens": progress.iter * run.trainer.tokens_per_iter,
            "elapsed_s": progress.elapsed_s,
            "train_loss": train_loss,
            "val_loss": val_loss,
            "val_bits_per_byte": val_bpb,
            "learning_rate": self.rate,
            "grad_norm": self.last_step.grad_norm,
            "tokens_per_second": tokens_per_second,
        }
        paths = run.paths
        with self._disk(paths.metrics, final=final):
            append_metrics(paths.metrics, metrics)
        with self._disk(paths.samples, final=final):
            append_sample(paths.samples, progress.iter, text)
            progress.samples_bytes = paths.samples.stat().st_size
        progress.evaluations_since_best += 1
        if is_best:
            # Where this save fails, a later model that beats the one on disk must still replace it.
            with self._disk(paths.out, final=final):
                save_checkpoint(paths.out, self._checkpoint(train_loss, val_loss, val_bpb))
                progress.best_iter, progress.best_val_loss = progress.iter, val_loss
                progress.best_val_bits_per_byte = val_bpb
                progress.evaluations_since_best = 0
        if final:
            progress.finished = "max_iters"
        elif recipe.patience and progress.evaluations_since_best >= recipe.patience:
            progress.finished = "patience"
        self._save_last(train_loss, val_loss, val_bpb, final=progress.finished is not None)

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
        run.progress.elapsed_s = time.perf_counter() - self.epoch
        resume = resume_values(run.trainer, run.progress, compiled=run.compiled)
        checkpoint = self._checkpoint(train_loss, val_loss, val_bpb)
        with self._disk(run.paths.last, final=final):
            save_checkpoint(
                run.paths.last,
                dataclasses.replace(checkpoint, resume=resume),
                previous=run.paths.previous,
            )
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
    def _disk(self, path: Path, *, final: bool) -> Iterator[None]:
        """A write that fails is a warning while another one will come, else the end of the run."""
        try:
            yield
        except OSError as error:
            why = f"{path} could not be saved: {error.strerror or error}"
            if final:
                raise PicoEdgeError(
                    f"{why}: what was saved before is whole; make room, then --resume"
                ) from error
            self.reporter.say(f"warning: {why}: training goes on")


def resume_command(data: Sequence[StrPath], settings: TrainSettings) -> str:
    """The command that continues this run exactly. Example: pico-edge train data.txt --resume."""
    words = ["pico-edge", "train", *(str(path) for path in data)]
    # What the checkpoint does not decide: where things are, and what the device does.
    for name in ("out", "val_data", "device", "dtype", "threads", "sample_prompt"):
        value = getattr(settings, name)
        if value != getattr(TrainSettings, name):
            words += ["--" + name.replace("_", "-"), str(value)]
    if settings.compile is not None:
        words.append("--compile" if settings.compile else "--no-compile")
    return " ".join(quote(word) for word in [*words, "--resume"])


def _result(run: Run, stop: StopRequest, command: str) -> TrainResult:
    progress = run.progress
    return TrainResult(
        file=None if progress.best_iter is None else str(run.paths.out),
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
    )
