"""Makes small copies of a model: the same kinds of layers, few and narrow, with random weights in float32.

A generator or learner is tested at a threshold of the model (see `length_limits`) with such a copy, in which the
threshold is a few tokens. That is cheaper than loading the weights, and shows differences that lower precision or
thousands of keys would hide. The copy computes its attention without kernels ("eager"), which defines the right result.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from darts_async.errors import DartsError, ModelError
from darts_async.models.length_limits import Threshold, thresholds

VOCABULARY = 64
SHORT = 4
"""The value of a threshold in a copy, if it is not smaller."""
_WIDTHS = {
    "vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "hidden_size_per_layer_input": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
_SPECIAL_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")
_MOST_PARAMETERS = 50_000_000
"""Limit of parameters; more belong to parts that do not process text."""
_SPREAD = 0.2
"""Scale of the weights: enough for sharp attention, so that each missing or extra key shows."""
_FOREIGN = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


@contextmanager
def foreign_code(what: str) -> Iterator[None]:
    """Turns every exception of a model's code inside the block into a `ModelError`."""
    try:
        yield
    except DartsError:
        raise
    except _FOREIGN as error:
        reason = str(error).splitlines()[0] if str(error) else "without a message"
        raise ModelError(f"{what}: its code raised {type(error).__name__}: {reason}") from error


def miniature(config: PreTrainedConfig, short: Sequence[Threshold] = ()) -> PreTrainedModel:
    """A small copy of what the configuration describes, the thresholds `short` being `SHORT` in it.

    Raises `ModelError` if none can be made, or it does not run.
    """
    with foreign_code(f"no small copy of {config.model_type} can be made"):
        small = _narrow(config.get_text_config())
        for threshold in short:
            _set(small, threshold)
        with torch.device("meta"):
            size = AutoModelForCausalLM.from_config(copy.deepcopy(small)).num_parameters()
        if size > _MOST_PARAMETERS:
            raise ModelError(f"no small copy of {config.model_type} can be made: one has {size} parameters")
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(small, dtype=torch.float32, attn_implementation="eager")
            _spread(model)
        model = model.eval().requires_grad_(False)
        with torch.no_grad():
            model(input_ids=torch.arange(1, 3 * SHORT)[None], use_cache=False)
        return model


def crossed(config: PreTrainedConfig, num_tokens: int) -> list[tuple[Threshold, ...]]:
    """The thresholds that this many tokens exceed: each alone, and together with all smaller ones.

    They ascend, so that the largest threshold of the first set that fails is the number to which a user must lower the
    length: up to that number only earlier sets are exceeded.
    """
    described = config.get_text_config().to_dict()
    exceeded = [threshold for threshold in thresholds(described) if threshold.value < num_tokens]
    found = sorted(exceeded, key=lambda threshold: threshold.value)
    sets = [each for end in range(1, len(found) + 1) for each in ((found[end - 1],), tuple(found[:end]))]
    return sets[1:]  # the smallest alone comes twice


def short_of(crossed: Sequence[Threshold]) -> int:
    """The number of tokens that a sample must exceed in a copy with these short thresholds: those of a short block, and
    of few short blocks."""
    sizes = sorted(min(SHORT, threshold.value) for threshold in crossed)
    return sizes[0] if len(sizes) == 1 else SHORT * SHORT


def _narrow(config: PreTrainedConfig) -> PreTrainedConfig:
    small = copy.deepcopy(config)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    grouped = (getattr(config, "num_key_value_heads", None) or config.num_attention_heads) < config.num_attention_heads
    sizes: dict[str, Any] = {name: min(size, have) for name, size in _WIDTHS.items() if (have := _int(config, name))}
    sizes |= {"hidden_size": 2 * head_dim, "num_attention_heads": 2, "num_key_value_heads": 1 if grouped else 2}
    sizes |= {name: 0 for name in _SPECIAL_TOKENS if getattr(config, name, None) is not None}
    sizes |= _few_layers(config)
    for name, size in sizes.items():
        if hasattr(small, name):
            setattr(small, name, size)
    return small


def _int(config: PreTrainedConfig, name: str) -> int:
    value = getattr(config, name, None)
    return value if isinstance(value, int) else 0


def _few_layers(config: PreTrainedConfig) -> dict[str, Any]:
    """One layer of each kind that the lists of the configuration distinguish, and two at least."""
    count = config.num_hidden_layers
    lists = {
        name: value
        for name, value in vars(config).items()
        if isinstance(value, list) and len(value) == count and name not in _SPECIAL_TOKENS and not _counts_up(value)
    }
    kinds = [tuple(str(value[place]) for value in lists.values()) for place in range(count)]
    places = sorted({kind: place for place, kind in reversed([*enumerate(kinds)])}.values())
    if len(places) == 1 < count:
        places = [0, 1]
    return {"num_hidden_layers": len(places)} | {
        name: [value[place] for place in places] for name, value in lists.items()
    }


def _counts_up(values: list[Any]) -> bool:
    """Whether these are indices of layers, and not something about each layer."""
    return all(isinstance(value, int) for value in values) and values == sorted(set(values)) and len(values) > 1


def _set(config: PreTrainedConfig, threshold: Threshold) -> None:
    *outer, name = threshold.path
    small = min(SHORT, threshold.value)
    if not outer:
        setattr(config, name, small)
        return
    section = getattr(config, outer[0])
    for key in outer[1:]:
        section = section[key]
    section[name] = small


def _spread(model: PreTrainedModel) -> None:
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=_SPREAD * min(1.0, (64 / weight.shape[-1]) ** 0.5))
