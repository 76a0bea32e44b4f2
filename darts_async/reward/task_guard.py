"""What keeps the scorers of reasoning-gym from executing an answer.

Some of them call `eval` or `sympy.parse_expr` (which calls `eval`) on what a model wrote. So `eval` means
`ast.literal_eval` in the modules of the first, and the others get an answer only if it is plain arithmetic. A family
whose module evaluates text and that is not listed here is refused: it may be of another version of the package.
"""

import ast
import importlib
import inspect
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

LITERALS = frozenset({"binary_matrix", "n_queens", "number_sorting", "spiral_matrix", "string_insertion"})
"""Families whose scorer calls `eval` on an answer, to read a list."""
EXPRESSIONS = frozenset(
    {"countdown", "intermediate_integration", "polynomial_multiplication", "puzzle24", "simple_integration"}
)
"""Families whose scorer calls `parse_expr` on an answer."""
OWN_TEXT = frozenset({"basic_arithmetic", "bitwise_arithmetic", "codeio"})
"""Families that evaluate the text of their questions, and never that of an answer."""
KNOWN = LITERALS | EXPRESSIONS | OWN_TEXT
FORWARDING = frozenset({"composite"})
_EVALUATING = frozenset({"eval", "exec", "parse_expr", "sympify", "parse_latex"})
_FUNCTIONS = frozenset(
    {"acos", "asin", "atan", "cos", "cosh", "cot", "csc", "exp", "ln", "log", "sec", "sin", "sinh", "sqrt", "tan"}
    | {"Abs", "acosh", "asinh", "atanh", "tanh"}
)
_CONSTANTS = frozenset({"C", "E", "pi"})
_INTEGRALS = frozenset({"intermediate_integration", "simple_integration"})
_WORD = re.compile(r"[A-Za-z_]\w*")
_CHARACTERS = re.compile(r"[\w+\-*/()., ]*", re.ASCII)
MAX_CHARS = 4_000
"""Longest expression."""
_MAX_NUMBER, _MAX_EXPONENT, _MAX_GROWTH = 10**12, 99, 10_000
"""Limits of a number; of a number in an exponent; of the product of exponents on each other."""


def guard(family: str) -> None:
    """Make the scorer of a family safe for any answer, together with `is_harmless`.

    Raises:
        ValueError: it cannot be made safe.
    """
    if reason := refusal(family):
        raise ValueError(reason)
    if family in LITERALS:
        vars(_module(family))["eval"] = ast.literal_eval


def refusal(family: str) -> str | None:
    """Why a family cannot be scored safely, if it cannot."""
    if family in FORWARDING:
        return f"the family {family!r} gives answers to the scorers of other families; name those in its place"
    found = frozenset[str]() if family in KNOWN else evaluates(inspect.getsource(_module(family)))
    if not found:
        return None
    return (
        f"the scorer of the family {family!r} may execute what a response says, because its module calls "
        f"{', '.join(sorted(found))}; leave it out"
    )


def evaluates(source: str) -> frozenset[str]:
    """The functions that a module calls and that execute a text. One that it defines by that name is another thing.

    Example:
        >>> evaluates("x = eval('1')"), evaluates("def eval(x): ...\\ny = eval(1)")
        (frozenset({'eval'}), frozenset())
    """
    nodes = list(ast.walk(ast.parse(source)))
    own = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    called = {ast.unparse(node.func).rpartition(".")[2] for node in nodes if isinstance(node, ast.Call)}
    return frozenset(called & _EVALUATING - own)


def is_harmless(family: str, answer: str, entry: Mapping[str, Any]) -> bool:
    """Whether the scorer of a family may get an answer. An expression consists of numbers of moderate size, the four
    operations, powers, and the words that its family needs: those of the reference answer, and functions for integrals.

    Example:
        >>> is_harmless("countdown", "(1 + 2) * 3", {}), is_harmless("countdown", "exit()", {})
        (True, False)
    """
    if family not in EXPRESSIONS:
        return True
    if len(answer) > MAX_CHARS or "__" in answer or not _CHARACTERS.fullmatch(answer):
        return False
    functions = _FUNCTIONS if family in _INTEGRALS else frozenset[str]()
    names = frozenset[str]()
    if family in _INTEGRALS | {"polynomial_multiplication"}:
        names = frozenset(_WORD.findall(f"{entry.get('answer')} {entry.get('metadata', {}).get('variable', '')}"))
    if family in _INTEGRALS:
        names |= _CONSTANTS
    try:
        tree = ast.parse(answer, mode="eval")
        return _is_arithmetic(tree.body, names - functions, functions) and _growth(tree.body) <= _MAX_GROWTH
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # what `ast.parse` raises
        return False


def _is_arithmetic(node: ast.expr, names: frozenset[str], functions: frozenset[str]) -> bool:
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return abs(value) < _MAX_NUMBER
        case ast.Name(id=name):
            return name in names
        case ast.UnaryOp(op=ast.UAdd() | ast.USub(), operand=operand):
            return _is_arithmetic(operand, names, functions)
        case ast.BinOp(left=left, op=ast.Add() | ast.Sub() | ast.Mult() | ast.Div() | ast.Pow(), right=right):
            return _is_arithmetic(left, names, functions) and _is_arithmetic(right, names, functions)
        case ast.Call(func=ast.Name(id=name), args=[_] | [_, _] as values, keywords=[]):
            return name in functions and all(_is_arithmetic(each, names, functions) for each in values)
    return False


def _growth(node: ast.AST) -> float:
    """How many times as many digits powers make of a number, at most; infinity for a power in an exponent, and for a
    large number there."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        return _growth(node.left) * _of_exponent(node.right)
    return max((_growth(child) for child in ast.iter_child_nodes(node)), default=1.0)


def _of_exponent(exponent: ast.expr) -> float:
    numbers = list(_numbers(exponent))
    is_power = any(isinstance(node, ast.Pow) for node in ast.walk(exponent))
    if is_power or len(numbers) > 3 or any(number > _MAX_EXPONENT for number in numbers):
        return float("inf")
    product = 1.0
    for number in numbers:
        product *= max(1.0, number)
    return product


def _numbers(node: ast.AST) -> Iterator[float]:
    for each in ast.walk(node):
        if isinstance(each, ast.Constant) and isinstance(each.value, int | float):
            yield float(each.value)


@lru_cache(maxsize=256)
def _module(family: str) -> Any:
    from reasoning_gym.factory import DATASETS  # two seconds, and rarely needed

    return importlib.import_module(DATASETS[family][0].__module__)
