r"""Recognises the form of an answer by its text, without sympy: a number with a unit, or an answer in words.

The parser of mathematics reads a word as a product of its letters: for it "5 dollars" is not 5, and "listen" equals
"silent". So words are handled here first:

- a number before plain words is the number (`36 dollars`, `12 apples`, `5 miles per hour`), unless one of the words
  changes it (`5 million`, `2 thirds`, `3 alpha`);
- a money sign before a number is left out (`\$36`, `US$5`);
- a number word up to ninety-nine is its number (`five`, `twenty-five dollars`);
- any other answer in words is *prose* (`2 hours and 5 minutes`, `no solution`), and is compared as text.

A word has at least four letters, and not all in the order of the alphabet: `abc` and `wxyz` are products of variables.
"""

import re

_UP_TO_NINETEEN = re.findall(
    r"\w+",
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen",
)
_TENS = re.findall(r"\w+", "twenty thirty forty fifty sixty seventy eighty ninety")
_NUMBERS = {word: number for number, word in enumerate(_UP_TO_NINETEEN)}
_NUMBERS |= {ten: 10 * place for place, ten in enumerate(_TENS, start=2)}
_NUMBERS |= {f"{ten}-{one}": _NUMBERS[ten] + _NUMBERS[one] for ten in _TENS for one in _UP_TO_NINETEEN[1:10]}

_SHORT_UNITS = frozenset({"per", "of", "the", "old", "usd", "eur", "gbp", "yen"})
_SHORT_PROSE = frozenset({"yes", "no", "odd", "all"})
_CHANGES_A_NUMBER = re.compile(
    r"tens?|hundreds?|thousands?|[mbtr]+illions?|dozens?|scores?|gross|pairs?|hal(f|ves)|quarters?|percent(age)?|plus"
    r"|minus|times|over|divided|multiplied|squared?|cubed?|roots?|power|factorial|modulo|than|thirds?|(?!months?$).*ths?"
)
_MATHEMATICS = re.compile(
    r"a?(rc)?(sin|cos|tan|sec|csc|cot)h?|sqrt|cbrt|frac|dfrac|tfrac|cdot|infinity|infty|emptyset|union|floor|ceil|binom"
    r"|alpha|beta|gamma|delta|epsilon|zeta|theta|iota|kappa|lambda|sigma|upsilon|omega|(var)?(phi|rho)"
)
_BRACES = re.compile(r"(?P<box>\\(?:boxed|fbox)\s*\{)|\\.|[{}]", re.DOTALL)
_MATH = re.compile(
    r"(?<!\\)\$\$(?P<display>(?:\\.|[^\\$])+)\$\$|(?<!\\)\$(?P<inline>(?:\\.|[^\\$])+)\$"
    r"|\\\[(?P<bracket>(?:(?!(?<!\\)\\\[).)+?)\\\]|\\\((?P<parenthesis>(?:(?!(?<!\\)\\\().)+?)\\\)",
    re.DOTALL,
)
_LEAD = re.compile(r"\A[A-Za-z ]*(?:\bis\s|[a-z]{3}:)\s*(?=.*\d|\W*[A-J]\W*$)")
"""The words before an answer: "The total is", "Answer:"."""
_FULL_STOP = re.compile(r"(?<!\\right)\.\Z")
_NUMBER = r"[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:/\d+)?"
_WITH_UNIT = re.compile(rf"(?P<number>{_NUMBER})(?P<words>(?:\s+[A-Za-z]+)+)")
_MONEY = re.compile(rf"(?P<sign>[-+]?)\s*(?:(?:US|CA|C|AU|A|NZ|HK)?\\?\$|[€£¥])\s*(?P<rest>{_NUMBER}(?:\s+[A-Za-z]+)*)")
_IN_TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm|mbox)\s*\{([^{}]*)\}|\\[ ,;:!]|~")
_PROSE = re.compile(r"[A-Za-z0-9\s.,;:'\u2019()/%-]+")


def last_box(text: str) -> str | None:
    """The content of the last closed box. A brace after a backslash is text."""
    opened, last = list[int | None](), (-1, -1)
    for token in _BRACES.finditer(text):
        if token.lastgroup == "box":
            opened.append(token.end())
        elif token[0] == "{":
            opened.append(None)
        elif token[0] == "}" and opened:
            begin = opened.pop()
            last = max(last, (begin, token.start())) if begin is not None else last
    return text[slice(*last)] if last[0] >= 0 else None


def content_of(answer: str) -> str:
    """The answer without its box or delimiters, without the words before it and the full stop after it."""
    box = last_box(answer)
    content = _FULL_STOP.sub("", _LEAD.sub("", (answer if box is None else box).strip()))
    math = _MATH.fullmatch(content)
    return without_unit(math[math.lastgroup] if math is not None and math.lastgroup is not None else content)


def has_math(content: str) -> bool:
    """Whether it has a part in the delimiters of mathematics."""
    return _MATH.search(content) is not None


def without_unit(content: str) -> str:
    r"""The number of an answer that has one beside words or a money sign; any other answer unchanged.

    >>> [without_unit(answer) for answer in ("US$5", "36 dollars", "twenty-five", "5 million", "2 abc")]
    ['5', '36', '25', '5 million', '2 abc']
    """
    money = _MONEY.fullmatch(content.strip())
    content = content if money is None else money["sign"] + money["rest"]
    first, _, rest = content.strip().partition(" ")
    number = _NUMBERS.get(first.lower())
    plain = content if number is None else f"{number} {rest}".strip()
    found = _WITH_UNIT.fullmatch(plain.strip())
    if found is not None and all(map(_is_unit, found["words"].lower().split())):
        return found["number"]
    return plain if number is not None and not rest else content


def prose(content: str) -> str | None:
    r"""The words of an answer in words, without case, spacing and `\text`; None if the answer is an expression.

    >>> prose(r"2 \text{ Hours and } 5 minutes")
    '2 hours and 5 minutes'
    >>> prose("5x + 3")
    """
    plain = " ".join(_IN_TEXT.sub(lambda found: f" {found[1] or ''} ", content).split())
    if _PROSE.fullmatch(plain) is None or without_unit(plain) != plain:
        return None
    plain = plain.rstrip(".").casefold()
    words = re.findall(r"[a-z]+", plain)
    mathematical = "percent" in words or any(map(_MATHEMATICS.fullmatch, words))
    is_prose = plain in _SHORT_PROSE or (not mathematical and any(map(_is_word, words)))
    return plain if is_prose else None


def _is_unit(word: str) -> bool:
    is_known = word in _SHORT_UNITS or _is_word(word)
    return is_known and not (_CHANGES_A_NUMBER.fullmatch(word) or _MATHEMATICS.fullmatch(word) or word in _NUMBERS)


def _is_word(word: str) -> bool:
    return len(word) >= 4 and list(word) != sorted(set(word))
