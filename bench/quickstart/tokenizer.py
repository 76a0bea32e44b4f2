"""The word-level tokenizer of the chain task: one token per word, words separated by white space.

`tokenizers.Tokenizer.from_file(directory / "tokenizer.json")` and `transformers.AutoTokenizer.from_pretrained`
give the same ids, and nothing is added before or after. Decoding joins words by single spaces, so encoding
and decoding a text of the task gives it back.
"""

import json
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from darts_async.quickstart.task import WORDS

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
SPECIAL_TOKENS = (PAD, EOS, UNKNOWN)
VOCABULARY = {word: token_id for token_id, word in enumerate((*SPECIAL_TOKENS, *WORDS))}
PAD_ID, EOS_ID = VOCABULARY[PAD], VOCABULARY[EOS]

_TRANSFORMERS_SETTINGS = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "pad_token": PAD,
    "eos_token": EOS,
    "unk_token": UNKNOWN,
    "clean_up_tokenization_spaces": False,
    "padding_side": "left",
}


def build_tokenizer(vocabulary: dict[str, int] = VOCABULARY) -> Tokenizer:
    """The tokenizer of the task, or of one with more words."""
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer


def save_tokenizer(directory: Path, vocabulary: dict[str, int] = VOCABULARY) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`."""
    build_tokenizer(vocabulary).save(str(directory / "tokenizer.json"))
    settings = json.dumps(_TRANSFORMERS_SETTINGS, indent=2) + "\n"
    (directory / "tokenizer_config.json").write_text(settings)
