"""Scores a response by running the program in it on the test cases of its record, in a sandbox.

The program is the last fenced block of the response (after its thoughts) that is labelled as Python, or else the last
without a label. Test cases are a field of the record, in one
of the forms that data sets have, or one of these as a JSON text:

    [{"input": "21\\n", "output": "42\\n"}, ...]       what it reads and what it has to print
    {"inputs": ["21\\n", ...], "outputs": ["42\\n", ...]}
    ["assert double(21) == 42", ...]                 statements that are executed after the program

A program that crashes, hangs or exceeds a limit fails its test: that is a reward. A record without test cases, and a
sandbox that does not work, are failures: then there is no reward.

Printed output is compared line by line without white space at the ends of lines. A statement counts as passed only if
the program comes to its end: one that leaves early (`sys.exit(0)`) has not passed. It runs in the process of the
program, which could deceive it on purpose; what is read and printed is the safer form.
"""

import json
import re
import secrets
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from darts_async.errors import DataError
from darts_async.reward.sandbox.choice import Choice, choose_isolation
from darts_async.reward.sandbox.program import Outcome, ProgramLimits, run_program
from darts_async.reward.worker_messages import CodeSpec

_OPENS = re.compile(r"[ \t]*(`{3,})[ \t]*([^`\s]*)[^`\n]*\n")
_CLOSES = re.compile(r"[ \t]*(`{3,})(?!\w)")
_PYTHON = re.compile(r"(?:python|py)[\d.]*", re.IGNORECASE)
_END_OF_THOUGHTS = "</think>"
_FILE = "program.py"


@dataclass(frozen=True, slots=True)
class Case:
    """One test case."""

    stdin: str = ""
    stdout: str | None = None
    """What is to be printed; None where a statement decides."""
    statement: str = ""


class CodeReward:
    """A reward function with the settings of `reward.functions[].code`.

    Example:
        >>> reward = CodeReward(CodeSpec())
        >>> response = "```python\\nprint(2 * int(input()))\\n```"
        >>> tests = [{"input": "21", "output": "42"}]
        >>> reward(prompt="", response=response, answer="", metadata={"tests": tests}, finish_reason="stop")
        1.0
    """

    def __init__(self, spec: CodeSpec) -> None:
        """Raises `ConfigError` if this machine cannot confine programs."""
        self._spec = spec
        self.choice = isolation_of(spec)
        self._limits = ProgramLimits(
            wall_s=spec.wall_s,
            cpu_s=spec.cpu_s,
            memory_bytes=round(spec.memory_mib * (1 << 20)),
            processes=spec.processes,
            file_bytes=round(spec.file_mib * (1 << 20)),
            files_bytes=round(spec.files_mib * (1 << 20)),
            output_bytes=round(spec.output_kib * (1 << 10)),
        )

    def __call__(
        self, *, prompt: str, response: str, answer: str, metadata: dict[str, Any], finish_reason: str
    ) -> float:
        """The share of test cases that pass, or 1 if all do. Raises `DataError` and `SandboxError`."""
        cases = cases_of(metadata, self._spec.tests_field)
        program = program_in(response)
        if program is None:
            return 0.0
        num_passed, ends_at_s = 0, time.monotonic() + self._spec.total_s
        for case in cases:
            left_s = ends_at_s - time.monotonic()
            if left_s > 0 and self._passes(program, case, min(left_s, self._spec.wall_s)):
                num_passed += 1
            elif self._spec.score == "all" or left_s <= 0:
                break
        return num_passed / len(cases) if self._spec.score == "share" else float(num_passed == len(cases))

    def _passes(self, program: str, case: Case, wall_s: float) -> bool:
        if case.stdout is not None:
            return _lines(self._run(program, case.stdin, wall_s)) == _lines_of(case.stdout)
        mark = secrets.token_hex(16)
        ended = self._run(f"{program}\n{case.statement}\nprint({mark!r})\n", case.stdin, wall_s)
        return ended is not None and ended.stdout.decode(errors="replace").rstrip().endswith(mark)

    def _run(self, source: str, stdin: str, wall_s: float) -> Outcome | None:
        """How it ended, if it ended well."""
        limits = replace(self._limits, wall_s=wall_s)
        argv, files = (self.choice.isolation.python, "-I", _FILE), {_FILE: source.encode(errors="replace")}
        outcome = run_program(argv, files, self.choice.isolation, limits, stdin.encode(errors="replace"))
        return outcome if outcome.is_good else None


def isolation_of(spec: CodeSpec) -> Choice:
    """How programs are confined on this machine.

    Raises:
        ConfigError: they cannot be confined.
    """
    return choose_isolation(spec.isolation, spec.python or sys.executable, allow_weaker=spec.allow_weaker)


def program_in(response: str) -> str | None:
    """The last fenced block after the thoughts that is labelled as Python, or else the last without a label: where both
    are there, that may be an example of what is printed. None if there is neither."""
    labelled = unlabelled = None
    for label, content in _blocks(response.rpartition(_END_OF_THOUGHTS)[2]):
        if not label:
            unlabelled = content
        elif _PYTHON.fullmatch(label):
            labelled = content
    return unlabelled if labelled is None else labelled


def _blocks(text: str) -> Iterator[tuple[str, str]]:
    """The label and the content of each fenced block. Blocks in other languages count: their ends begin no block."""
    fence, label, lines = "", "", list[str]()
    for line in re.split(r"(?<=\n)", text):
        if not fence:
            if opens := _OPENS.match(line):
                fence, label, lines = opens[1], opens[2], []
        elif (closes := _CLOSES.match(line)) and len(closes[1]) >= len(fence):
            yield label, "".join(lines)
            fence = ""
        else:
            lines.append(line)


def cases_of(metadata: Mapping[str, Any], field: str) -> list[Case]:
    """The test cases of a record.

    Raises:
        DataError: it has none, or they have another form.
    """
    if field not in metadata:
        fields = ", ".join(map(repr, metadata)) or "none"
        raise DataError(f"the record has no field {field!r} with test cases (`tests_field`); its fields are {fields}")
    tests = metadata[field]
    if isinstance(tests, str):
        try:
            tests = json.loads(tests)
        except ValueError as error:
            raise DataError(f"the test cases in {field!r} are a text that is not JSON: {error}") from error
    try:
        cases = list(_cases(tests))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"the test cases in {field!r} are {str(tests)[:100]!r}; write [{{input, output}}, ...], "
            "{inputs: [...], outputs: [...]} or a list of statements"
        ) from error
    if not cases:
        raise DataError(f"the record has no test case in {field!r}")
    return cases


def _cases(tests: Any) -> Iterator[Case]:
    if isinstance(tests, dict):
        for stdin, stdout in zip(tests["inputs"], tests["outputs"], strict=True):
            yield Case(_text(stdin), _text(stdout))
        return
    for test in tests:
        if isinstance(test, str):
            yield Case(statement=test)
        else:
            yield Case(_text(test["input"]), _text(test["output"]))


def _text(value: object) -> str:
    """A text; some data sets have a list of lines."""
    if isinstance(value, list):
        return "\n".join(map(_text, value))
    if not isinstance(value, str):
        raise TypeError(value)
    return value


def _lines(outcome: Outcome | None) -> list[str] | None:
    return None if outcome is None else _lines_of(outcome.stdout.decode(errors="replace"))


def _lines_of(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]
