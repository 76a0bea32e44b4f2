"""A program that checks models: whether the weights fit the configuration, and whether the model can decode and train
on samples as long as those of the run.

It is a process of its own because it imports torch, which the launcher does not. Its input is a `Question` and its
output a list of `Problem`, both as JSON. It reads no weights.
"""

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec

from darts_async.config import RunConfig
from darts_async.errors import ModelError
from darts_async.models.weight_files import WEIGHT_FILE, read_header
from launcher.problems import Problem, shown

_SAME_MODEL = "take config.json and the weights from one model"


class Question(msgspec.Struct):
    config: str
    """`RunConfig` as JSON."""
    directories: dict[str, str]
    """Directory of each model, by the setting that names it."""


def main() -> None:
    question = msgspec.json.decode(sys.stdin.buffer.read(), type=Question)
    config = RunConfig.model_validate_json(question.config)
    findings = [
        finding
        for setting, directory in question.directories.items()
        for finding in _findings(config, setting, Path(directory))
    ]
    sys.stdout.buffer.write(msgspec.json.encode(findings))


def _findings(config: RunConfig, setting: str, directory: Path) -> Iterator[Problem]:
    found = [*_check_names(setting, directory)]
    yield from found
    if not all(finding.is_hint for finding in found):
        return
    try:
        _try_out(config, setting, directory)
    except ModelError as error:
        yield Problem(setting, str(error), shown(str(directory)))


def _check_names(setting: str, directory: Path) -> Iterator[Problem]:
    """The weights have the names and shapes that transformers expects for the configuration."""
    from transformers import AutoModelForCausalLM

    value = shown(str(directory))
    if importlib.util.find_spec("accelerate") is None:  # transformers needs it to load a model without its weights
        return
    try:
        _, loading = AutoModelForCausalLM.from_pretrained(
            directory, device_map="meta", output_loading_info=True, ignore_mismatched_sizes=True
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        yield Problem(setting, f"{directory} cannot be loaded as a causal language model: {reason}", value)
        return
    for name, found, expected in sorted(loading["mismatched_keys"])[:1]:
        message = (
            f"{_file_of(directory, name)} has {name} of shape {list(found)}, but config.json describes "
            f"{list(expected)} ({len(loading['mismatched_keys'])} tensors differ)"
        )
        yield Problem(setting, message, value, _SAME_MODEL)
    if missing := sorted(loading["missing_keys"]):
        message = f"the weights in {directory} lack {missing[0]} ({len(missing)} missing), which config.json describes"
        yield Problem(setting, message, value, _SAME_MODEL)
    if extra := sorted(loading["unexpected_keys"]):
        message = f"the weights have {extra[0]} ({len(extra)} in all), which config.json does not describe: ignored"
        yield Problem(setting, message, value, _SAME_MODEL, is_hint=True)


def _file_of(directory: Path, name: str) -> Path:
    """The file with a tensor, or the directory if the tensor has another name there."""
    for file in sorted(directory.glob("*.safetensors")):
        if name in read_header(file):
            return file
    return directory / WEIGHT_FILE if (directory / WEIGHT_FILE).is_file() else directory


def _try_out(config: RunConfig, setting: str, directory: Path) -> None:
    from transformers import AutoConfig

    from darts_async.learner.packing.trial import check_packing
    from darts_async.learner.trainer_setup import longest as longest_row

    described = AutoConfig.from_pretrained(directory)
    check_packing(described, longest_row(config))
    if setting == "model.path" and config.generator.capabilities.has_own_decoder:
        from darts_async.generator.embedded.decoder import check_decoding
        from darts_async.generator.embedded.engine import longest as longest_step

        settings = config.generator
        check_decoding(described, longest_step(settings.num_slots, settings.max_context_tokens))


if __name__ == "__main__":
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    main()
