"""A `model.onnx` on onnxruntime: its weights, its metadata, the provider that runs it.

Knows ids and logits, not text or sampling; `pico_edge.runtime.cache` is the state of a generation.

Try: `Session("model.onnx").new_cache().prefill([[72, 105]])` -> logits (1, V) of the next token.
"""

from __future__ import annotations

import functools
import os
import statistics
import threading
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter as clock
from typing import Any

import numpy as np

from pico_edge import artefact
from pico_edge.config import GPTConfig
from pico_edge.errors import ArtefactError, PicoEdgeError, UsageError
from pico_edge.ngrams import NGrams
from pico_edge.runtime.cache import ORT_ERRORS, Cache
from pico_edge.runtime.cpu import may_saturate
from pico_edge.runtime.installed import (
    DISTRIBUTIONS,
    import_onnxruntime,
    install_advice,
    onnxruntime_distributions,
    overlap_notice,
    too_old,
    upgrade_advice,
)
from pico_edge.runtime.portable import PortableCache
from pico_edge.runtime.preflight import check_unchanged, read_model_file
from pico_edge.runtime.threads import Pace, fixed_threads, physical_cores
from pico_edge.runtime.weights import FEW, MANY, Weights, is_utf8
from pico_edge.tokenizer import Tokenizer, tokenizer_from_dict

ort = import_onnxruntime()

PROVIDER_ENV = "PICO_EDGE_PROVIDER"
ORT_PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "directml": "DmlExecutionProvider",
    "webgpu": "WebGpuExecutionProvider",
}
ORT_DEVICES = {"cpu": "cpu", "cuda": "cuda", "directml": "dml", "webgpu": "webgpu"}
DTYPES = ("float32", "float16", "int8", "uint8")
EXTERNAL_FOLDER = "session.model_external_initializers_file_folder_path"
# Bytes of a file so small that fewer threads may be faster; it loads twice in 20 ms.
TIMED_AT_LOAD = 4 << 20
TIMED_STEPS = 16
SPIN_US = "2000"  # far more than passes between two steps
SATURATING = "com.microsoft.QGemm"  # u8 times s8: kernels for x86 without VNNI add in 16 bits
# The provider webgpu is a plugin beside onnxruntime, of any distribution; see runtime/webgpu.py.
WEBGPU_PLUGIN = "onnxruntime-ep-webgpu"
WEBGPU_EXPORT = f"pico-edge export ckpt.pt --target {artefact.WEBGPU_TARGETS[0]}"


class Session:
    """The weights of one file, loaded once; serves any number of caches, one call at a time each.

    provider: "cpu", "cuda", "directml", "webgpu" (experimental), or "auto": PICO_EDGE_PROVIDER if
    that is set, else the one the file is made for, else cpu. threads: a number, or "auto":
    PICO_EDGE_THREADS if that is set, else chosen from the physical cores that this process may use,
    and again while it runs, see Pace. allow_foreign: load a file that is not of pico-edge; it has
    no config, hence no cache. lean: where a file has a form of its weights for steps and another
    one for prompts, the first does both: loaded in half the time, a third less memory, and prompts
    take half as long again; logits differ by rounding.
    Raises ArtefactError for a file that is refused, UsageError for an argument, PicoEdgeError when
    the provider cannot run it. Nothing moves to another provider without a word: what runs is in
    `provider`, and a choice of "auto" that is not the file's own is in `notices`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        provider: str = "auto",
        threads: str | int = "auto",
        allow_foreign: bool = False,
        lean: bool = False,
    ) -> None:
        self.path = Path(path)
        fixed = fixed_threads(threads)
        most = physical_cores() if fixed is None else fixed
        model_file = read_model_file(self.path, allow_foreign=allow_foreign)
        self.size = model_file.size  # bytes
        # What a step reads: of the positions only one row.
        self.weight_bytes = sum(t.n_bytes for t in model_file.initializers if ".wpe." not in t.name)
        self.metadata: dict[str, Any] = model_file.metadata
        self.export: dict[str, Any] = self.metadata.get(artefact.EXPORT_KEY, {"target": "cpu"})
        self.sampling: dict[str, Any] = self.metadata.get(artefact.SAMPLING_KEY, {})
        self._config = model_file.config
        wanted = os.environ.get(PROVIDER_ENV) or "auto" if provider == "auto" else provider
        if wanted == "webgpu":
            from pico_edge.runtime import webgpu

            if self.export.get("cache") == "int8":  # the kernel takes one, and fails when it runs
                raise PicoEdgeError(
                    f"{self.path.name} has an int8 cache, which webgpu cannot run: "
                    f"{WEBGPU_EXPORT} --quantize, or run it without --provider"
                )
            webgpu.register()
        self.provider, self.notices = choose_provider(
            wanted, self.export.get("target"), ort.get_available_providers(), file=self.path.name
        )
        needed = self.export.get("min_onnxruntime")
        if too_old(ort.__version__, needed):
            raise PicoEdgeError(f"{self.path}: {upgrade_advice(ort.__version__, needed)}")
        overlap = overlap_notice()
        if overlap is not None:
            self.notices.append(overlap)
        self.device = ORT_DEVICES[self.provider]
        # The products of the form for prompts would saturate; those of the other one do not.
        lean = lean or (may_saturate() and SATURATING in model_file.op_types)
        self._weights = Weights.of(model_file, lean=lean) if self.provider == "cpu" else None
        self._model_file = model_file
        self._fixed_threads = most
        # Calls of more tokens are for the other form of the weights; None if there is no other.
        self.few_tokens = None
        if self._weights is not None and MANY in self._weights.graphs:
            self.few_tokens = artefact.few_tokens(self.export)
        # DirectML's GroupQueryAttention takes the past for empty when S > 1: wrong text, no error.
        self.appends = self.provider != "directml"
        # DirectML's sessions do not take calls from several threads at once.
        self.one_at_a_time = threading.Lock() if self.provider == "directml" else None
        self.cache_dtype = self._dtype(artefact.past_names(1)[0])
        self.logits_dtype = self._dtype(artefact.LOGITS)
        self.pace: Pace | None = None
        adapts = self._config is not None and self.export.get("target") != artefact.PORTABLE
        if self.few_tokens is not None:  # first: what it is made of is given back before the rest
            self.for_prompts = self._load(MANY, most)
        started = clock()
        self._loaded = {most: self._load(FEW, most)}  # by threads
        load_s = clock() - started
        if fixed is None and most > 1 and self.provider == "cpu" and adapts:
            self.pace = Pace(most, cost_s=load_s)
            if self.size <= TIMED_AT_LOAD:
                times = {n: self._step_s(n) for n in (most, self.pace.fewer)}
                self.pace = Pace(most, cost_s=load_s, means_s=times)

    @property
    def threads(self) -> int:
        """Threads that the next step will use."""
        return self._fixed_threads if self.pace is None else self.pace.threads

    @property
    def ort(self) -> Any:
        """onnxruntime's session for the next step."""
        return self.with_threads(self.threads)

    def with_threads(self, threads: int) -> Any:
        """onnxruntime's session for steps, with so many threads; loaded when first asked for.

        Its kernels have weights of their own (125 MB at 12 x 768 int8). Raises
        PicoEdgeError when the file cannot be loaded again, or has changed.
        """
        if threads not in self._loaded:
            self._loaded[threads] = self._load(FEW, threads)
        return self._loaded[threads]

    def _load(self, branch: str, threads: int) -> Any:
        loaded = _load(self.path, self.provider, threads, self._weights, branch)
        check_unchanged(self._model_file)
        return loaded

    def _step_s(self, threads: int) -> float:
        """Seconds of a step with so many threads, the median of a few."""
        cache = Cache(self, 1, 1, ort_session=self.with_threads(threads))
        times = []
        for _ in range(TIMED_STEPS):
            cache.truncate(0, 0)
            started = clock()
            cache.decode([0])
            times.append(clock() - started)
        return statistics.median(times)

    @property
    def config(self) -> GPTConfig:
        """The shape of the model. Raises ArtefactError for a foreign file, which does not say."""
        if self._config is None:
            raise ArtefactError(
                f"{self.path}: not a file of pico-edge, its model config is unknown: "
                "make it with pico-edge export"
            )
        return self._config

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the file, built when first asked for."""
        if artefact.TOKENIZER_KEY not in self.metadata:
            raise ArtefactError(f"{self.path}: not a file of pico-edge, it has no tokenizer")
        return tokenizer_from_dict(self.metadata[artefact.TOKENIZER_KEY])

    @functools.cached_property
    def ngrams(self) -> NGrams | None:
        """The table of the file to draft from, built when first asked for; None if it has none."""
        if artefact.NGRAMS_KEY not in self.metadata:
            return None
        table = NGrams.from_dict(self.metadata[artefact.NGRAMS_KEY])
        if table.n_vocab != self.tokenizer.n_vocab:
            raise ArtefactError(
                f"{self.path}: ngrams of {table.n_vocab} tokens, the tokenizer has "
                f"{self.tokenizer.n_vocab}: export the checkpoint again"
            )
        return table

    def _dtype(self, name: str) -> np.dtype[Any]:
        """Element type of an input or output; float32 where a foreign file has no such name."""
        values = (*self._model_file.inputs, *self._model_file.outputs)
        found = next((value.elem_type for value in values if value.name == name), "float32")
        if found not in DTYPES:
            raise ArtefactError(f"{self.path}: {name} is {found}: expected {', '.join(DTYPES)}")
        return np.dtype(found)

    def new_cache(self, batch: int = 1, capacity: int | None = None) -> Cache | PortableCache:
        """An empty cache of `batch` rows of up to `capacity` tokens each, block_size by default."""
        config = self.config
        capacity = config.block_size if capacity is None else capacity
        if self.export.get("target") == artefact.PORTABLE:
            run = functools.partial(self.ort.run, None)
            return PortableCache(run, config, batch, capacity, self.cache_dtype)
        if self.provider == "webgpu":
            from pico_edge.runtime.webgpu import WebGPUCache

            return WebGPUCache(self, batch, capacity)
        return Cache(self, batch, capacity)


def choose_provider(
    wanted: str, target: object, available: Sequence[str], *, file: str = "the file"
) -> tuple[str, list[str]]:
    """The provider that runs a file, and notices for the user; a pure function.

    wanted: "auto", or one of ORT_PROVIDERS; auto never chooses webgpu. target: what the file was
    exported for. available: onnxruntime's names. cpu runs the files of every target. Raises
    UsageError for an unknown name, ArtefactError for an unknown target, PicoEdgeError, with the
    cure, when `wanted` cannot run it.
    Example: ("auto", "cuda", ["CPUExecutionProvider"]) -> "cpu" and one notice.
    """
    if wanted != "auto" and wanted not in ORT_PROVIDERS:
        raise UsageError(f"provider is {wanted!r}: expected auto, {', '.join(ORT_PROVIDERS)}")
    if not isinstance(target, str) or target not in artefact.TARGET_PROVIDERS:
        raise ArtefactError(
            f"{file} is made for target {target!r}: this pico-edge knows "
            f"{', '.join(artefact.TARGET_PROVIDERS)}: upgrade pico-edge or export again"
        )
    here = [name for name, ort_name in ORT_PROVIDERS.items() if ort_name in available]
    made_for = artefact.TARGET_PROVIDERS[target]
    if wanted == "auto":
        if made_for in here:
            return made_for, []
        return "cpu", [
            f"{file} is made for {made_for}, which this onnxruntime does not have: running on cpu"
            f" (pip install {DISTRIBUTIONS[made_for]})"
        ]
    problems = []
    if wanted not in here:
        advice = f"pip install {WEBGPU_PLUGIN}" if wanted == "webgpu" else install_advice(wanted)
        problems.append(
            f"provider {wanted} is not in this onnxruntime {ort.__version__}, which has "
            f"{', '.join(here)}: {advice}"
        )
    targets = artefact.WEBGPU_TARGETS if wanted == "webgpu" else (wanted,)
    if wanted != "cpu" and target not in targets:
        problems.append(
            f"{file} is made for {target}, which {wanted} cannot run: "
            f"pico-edge export ckpt.pt --target {targets[0]}, or run it without --provider"
        )
    if problems:
        raise PicoEdgeError("; ".join(problems))
    if wanted == "webgpu":
        return wanted, ["provider webgpu is experimental"]
    return wanted, []


def _load(
    path: Path, provider: str, threads: int, weights: Weights | None, branch: str = FEW
) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 4  # nothing but crashes: errors come as exceptions
    # Measured: without spinning, two threads are slower than one.
    options.add_session_config_entry("session.intra_op.allow_spinning", "1")
    if weights is not None and len(weights.graphs) > 1:
        # Threads of the one session would spin for 0.1 s on the cores of the other: twice the time.
        options.add_session_config_entry("session.intra_op.spin_duration_us", SPIN_US)
    if provider in ("cuda", "webgpu"):
        # An operator without a kernel there would silently run on the CPU, with copies each step.
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    if provider == "directml":
        options.enable_mem_pattern = False
    model: str | bytes
    shared = []  # onnxruntime keeps addresses of these objects until the session is made
    if weights is None:
        model = os.fspath(path) if is_utf8(path) else path.read_bytes()
    else:
        model = weights.graphs[branch].model
        if weights.folder is not None:
            options.add_session_config_entry(EXTERNAL_FOLDER, weights.folder)
        for tensor, array in weights.arrays(branch).items():
            shared.append(ort.OrtValue.ortvalue_from_numpy(array))
            options.add_initializer(tensor, shared[-1])
    name = ORT_PROVIDERS[provider]
    try:
        if provider == "webgpu":
            from pico_edge.runtime import webgpu

            session = webgpu.load(os.fspath(path), options)
        else:
            session = ort.InferenceSession(model, options, providers=[name], enable_fallback=0)
    except (*ORT_ERRORS, UnicodeDecodeError) as error:  # its words may quote an attribute
        reason = str(error).splitlines()[0]
        if provider == "webgpu":
            reason += f": {WEBGPU_EXPORT}, or run it without --provider"
        if provider != "cpu":
            raise PicoEdgeError(f"{path}: provider {provider} cannot run it: {reason}") from error
        found = onnxruntime_distributions()
        advice = f": {install_advice(provider)}" if len(found) > 1 else ""
        raise ArtefactError(
            f"{path}: onnxruntime {ort.__version__} cannot load it: {reason}{advice}"
        ) from error
    session.disable_fallback()
    running = session.get_providers()
    if running[0] != name:  # a provider whose libraries are missing is dropped with a log line only
        raise PicoEdgeError(
            f"provider {provider} did not start, onnxruntime {ort.__version__} offers "
            f"{', '.join(running)} instead: {install_advice(provider)}, and check its driver"
        )
    return session
