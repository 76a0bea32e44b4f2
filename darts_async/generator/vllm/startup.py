"""Starts vLLM: its settings, environment and memory, and checks of them.

vLLM runs in a child process, the engine core; this process holds the client. A start takes seconds instead of most of a
minute. The child is forked, so it imports nothing again. On CPUs its only worker lives inside it, no model class is
inspected in another process, and nothing is compiled. A fork requires that this process has used neither several
threads of torch nor CUDA before.

vLLM is imported inside functions, never at the top of a module that others import.
"""

import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import structlog
from pydantic import ValidationError
from transformers import AutoConfig

from darts_async.config import VllmConfig
from darts_async.errors import ConfigError, EngineError, ModelError
from darts_async.generator.vllm.installed import InstalledVllm, require_vllm
from darts_async.generator.vllm.process_tree import binding_children
from darts_async.models.length_limits import why_too_long
from darts_async.models.location import known_stop_token_ids

WORKER_EXTENSION: Final = "darts_async.generator.vllm.worker.WorkerExtension"
WEIGHT_BACKEND: Final = "darts"
"""Both are in `worker`, which only vLLM's workers may import."""

_ENVIRONMENT: Final = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
_CPU_ENVIRONMENT: Final = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the worker lives in the engine core
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # as many threads as this process was given, on any core
}

_CPU_STEP_TOKENS: Final = 4096

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class VllmRequest:
    """What to start: the settings of the same names."""

    model_path: str
    settings: VllmConfig
    dtype: str
    num_slots: int
    max_context_tokens: int
    seed: int


@dataclass(frozen=True, slots=True)
class StartedVllm:
    """vLLM, running, and what it can take."""

    llm: Any
    """`vllm.v1.engine.async_llm.AsyncLLM`."""
    num_slots: int
    max_context_tokens: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]


def start_vllm(thread: ThreadPoolExecutor, wanted: VllmRequest) -> StartedVllm:
    """Load a model into vLLM, in a thread that is to outlive the engine: the engine core dies with it. Raises
    `ConfigError` if vLLM is missing, of another version, or has too little memory for one sample, `ModelError` if the
    model cannot be read or vLLM has no code for it, and `EngineError` if the engine core ended while it loaded."""
    config, vocab_size, eos_token_ids = thread.submit(_prepare, wanted).result()
    llm = thread.submit(_launch, config, wanted.model_path).result()  # vLLM keeps the frames of a first call forever
    num_slots = _count_slots(config, wanted)
    return StartedVllm(llm, num_slots, wanted.max_context_tokens, vocab_size, eos_token_ids)


def _prepare(wanted: VllmRequest) -> tuple[Any, int, tuple[int, ...]]:
    """vLLM's configuration, the size of the vocabulary, and the end-of-sequence tokens."""
    installed = require_vllm()
    vocab_size, eos_token_ids = _read_model(wanted)
    _set_environment(installed, wanted.settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # vLLM's imports warn about themselves
        config = _engine_config(installed, wanted)
    _size_cache(config, wanted, is_for_cpus=installed.is_for_cpus)
    return config, vocab_size, eos_token_ids


def _read_model(wanted: VllmRequest) -> tuple[int, tuple[int, ...]]:
    path = wanted.model_path
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ModelError(f"model.path {path!r} cannot be loaded as a causal language model: {error}") from error
    if (reason := why_too_long(config.to_dict(), wanted.max_context_tokens)) is not None:
        raise ModelError(f"model.path is {path!r}: {reason}")
    return int(config.get_text_config().vocab_size), known_stop_token_ids(Path(path))


def _set_environment(installed: InstalledVllm, settings: VllmConfig) -> None:
    """What only variables can say. Those that the user has set are not changed."""
    for name, value in (_ENVIRONMENT | (_CPU_ENVIRONMENT if installed.is_for_cpus else {})).items():
        os.environ.setdefault(name, value)
    os.environ["VLLM_ENGINE_READY_TIMEOUT_S"] = str(int(settings.start_deadline_s))


def _engine_config(installed: InstalledVllm, wanted: VllmRequest) -> Any:
    model_path, settings = wanted.model_path, wanted.settings
    try:
        from vllm.config import WeightTransferConfig
        from vllm.engine.arg_utils import AsyncEngineArgs
    except ImportError as error:
        raise ConfigError(
            f"{installed.name} {installed.version} is installed, but cannot be imported: {error}; install it with all "
            "that it needs"
        ) from error
    if installed.is_for_cpus:
        _do_without_compiler_and_inspection(AutoConfig.from_pretrained(model_path).architectures or [])
    try:
        arguments = AsyncEngineArgs(
            model=model_path,
            skip_tokenizer_init=True,
            dtype=wanted.dtype,
            seed=wanted.seed,
            max_model_len=wanted.max_context_tokens,
            max_num_seqs=wanted.num_slots,
            max_num_batched_tokens=_step_tokens(installed, wanted),
            enable_chunked_prefill=not installed.is_for_cpus,
            tensor_parallel_size=settings.tensor_parallel_size,
            gpu_memory_utilization=settings.gpu_memory_utilization,
            kv_cache_memory_bytes=settings.kv_cache_bytes,
            block_size=settings.block_size,
            enforce_eager=settings.enforce_eager or installed.is_for_cpus,
            generation_config="vllm",  # every sampling parameter comes with the request
            logprobs_mode="processed_logprobs",
            scheduling_policy="priority",
            weight_transfer_config=WeightTransferConfig(backend=WEIGHT_BACKEND),
            worker_extension_cls=WORKER_EXTENSION,
            disable_log_stats=True,
            use_tqdm_on_load=False,
        )
        return arguments.create_engine_config()
    except (ValueError, OSError, ImportError) as error:  # pydantic's ValidationError is a ValueError
        raise ModelError(
            f"vLLM cannot run model.path {model_path!r} with these settings of generator and generator.vllm: "
            f"{_reason(error)}"
        ) from error


def _reason(error: Exception) -> str:
    """Without pydantic's account of the input, which is all of vLLM's settings."""
    return "; ".join(detail["msg"] for detail in error.errors()) if isinstance(error, ValidationError) else str(error)


def _step_tokens(installed: InstalledVllm, wanted: VllmRequest) -> int | None:
    """On CPUs vLLM 0.32 dies of a prompt that is computed in parts: after all but the last part it winds the stream of
    a seeded sample back, which CPU streams cannot do. So a step there holds any prompt as a whole."""
    num_tokens = wanted.settings.max_num_batched_tokens
    return max(num_tokens or _CPU_STEP_TOKENS, wanted.max_context_tokens) if installed.is_for_cpus else num_tokens


def _do_without_compiler_and_inspection(architectures: list[str]) -> None:
    """On CPUs compiling gains nothing, and a model class that is imported here need not be inspected elsewhere. On GPUs
    that import might initialise CUDA, after which this process cannot fork."""
    import torch._dynamo
    from vllm import ModelRegistry

    torch._dynamo.config.disable = True
    for architecture in architectures:
        registered = ModelRegistry.models.get(architecture)
        if registered is not None:
            ModelRegistry.register_model(architecture, registered.load_model_cls())


def _size_cache(config: Any, wanted: VllmRequest, *, is_for_cpus: bool) -> None:
    """On CPUs give the cache what the slots need; refuse a cache that cannot hold one sample."""
    settings = wanted.settings
    needed = _blocks_per_sample(config, config.model_config.max_model_len)
    if settings.kv_cache_bytes is None:
        if is_for_cpus:
            per_slot = _blocks_per_sample(config, _tokens_per_sample(config, settings))
            num_blocks = max(needed, wanted.num_slots * per_slot) + 1
            config.cache_config.kv_cache_memory_bytes = _block_bytes(config) * num_blocks
    elif settings.kv_cache_bytes < (minimum := _block_bytes(config) * (needed + 1)):
        raise ConfigError(
            f"generator.vllm.kv_cache_bytes is {settings.kv_cache_bytes}, but keys and values of one sample of "
            f"generator.max_context_tokens {config.model_config.max_model_len} take {minimum}: raise the one or lower "
            "the other"
        )


def _launch(config: Any, model_path: str) -> Any:
    from vllm.v1.engine.async_llm import AsyncLLM

    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"  # the configuration has just set it to `spawn` on CPUs
    try:
        with binding_children(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return AsyncLLM.from_vllm_config(config, disable_log_stats=True)
    except (RuntimeError, TimeoutError) as error:
        raise EngineError(
            f"vLLM's engine core ended while it loaded {model_path!r}; what it wrote before says why: {error}"
        ) from error


def _count_slots(config: Any, wanted: VllmRequest) -> int:
    """The slots that the cache has room for. vLLM uses one block as padding."""
    num_blocks = int(config.cache_config.num_gpu_blocks) - 1
    tokens = _tokens_per_sample(config, wanted.settings)
    offered = max(1, min(wanted.num_slots, num_blocks // _blocks_per_sample(config, tokens)))
    kv_tokens = num_blocks * int(config.cache_config.block_size)
    log.info("vllm_ready", num_slots=offered, kv_tokens=kv_tokens, kv_tokens_per_sample=tokens)
    if offered < wanted.num_slots:
        reason = "memory for keys and values"
        log.warning("fewer_slots_than_wanted", wanted=wanted.num_slots, num_slots=offered, reason=reason)
    return offered


def _tokens_per_sample(config: Any, settings: VllmConfig) -> int:
    longest = int(config.model_config.max_model_len)
    return min(settings.kv_tokens_per_sample or longest, longest)


def _blocks_per_sample(config: Any, num_tokens: int) -> int:
    return -(-num_tokens // int(config.cache_config.block_size))


def _block_bytes(config: Any) -> int:
    """Keys and values of one block in all layers, on one worker."""
    model, parallel = config.model_config, config.parallel_config
    heads, layers = model.get_num_kv_heads(parallel), model.get_num_layers(parallel)
    return int(2 * layers * heads * model.get_head_size() * model.dtype.itemsize * config.cache_config.block_size)
