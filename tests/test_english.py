"""What a reader of the package meets is plain English: words and turns that stop a native reader are not used."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = sorted(path for folder in ("darts_async", "launcher") for path in (ROOT / folder).rglob("*.py"))

INSTEAD = {
    r"behind": "after, left, left over",
    r"by lot": "at random",
    r"for ever": "forever",
    r"anew": "again, new",
    r"nobody|whoever": "no process, any peer that: name the subject",
    r"stands?|stood": "is, holds, has, means",
    r"(?<!there )(?<!longer )is no (?!longer)": "is not a",
    r"(?:goes|go|went|going) on": "continues",
    r"makes of|made of what": "does with",
    r"judged|judging|judgements?": "scored, reward",
    r"fates?": "outcome",
    r"sees? to it|what cannot be meant": "ensures; an invalid message",
    r"is none of|not any more": "is not one of; no longer",
}
"""{what is not written: what is written in its place}"""


def texts_of(source: str) -> Iterator[tuple[int, str]]:
    """Comments, docstrings and sentences of a module, each line with its number."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value.strip():
            yield from enumerate(node.value.splitlines(), node.lineno)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def faults_of(path: Path) -> list[str]:
    """Every forbidden word of a file: where it is, and what to write."""
    return [
        f"{path.relative_to(ROOT)}:{number}: {found[0]!r} in {line.strip()[:80]!r}: write {instead}"
        for number, line in texts_of(path.read_text())
        for pattern, instead in INSTEAD.items()
        if (found := re.search(rf"\b(?:{pattern})\b", line, re.IGNORECASE))
    ]


def test_no_text_of_the_package_has_a_word_that_stops_a_reader() -> None:
    faults = [fault for path in FILES for fault in faults_of(path)]
    assert not faults, "\n".join(faults)


def test_words_are_found_in_docstrings_comments_and_messages_and_nowhere_else() -> None:
    source = '"""It goes on."""\nbehind = f"a fate of {behind}"  # for ever\nname = "judged"\n'
    assert [text for _, text in texts_of(source)] == ["It goes on.", "a fate of ", "# for ever"]
