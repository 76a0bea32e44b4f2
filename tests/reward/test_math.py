r"""The `math` verifier: what the answer of a response is, and that answers of every form equal themselves."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from darts_async.reward.answer_forms import content_of, last_box
from darts_async.reward.mathematics import answer_in, math

pytestmark = pytest.mark.slow
"""Importing sympy takes a second."""

FORMS = r"""
36
-7
0
1,234
1,234,567
3.14
.5
-0.25
50\%
12.5\%
\$36
\$1,250.50
$36
36\text{ dollars}
5\text{ cm}
10 \text{ cm}^2
90^\circ
45^{\circ}
\frac{1}{2}
-\frac{3}{4}
\dfrac{7}{8}
\tfrac12
\frac12
\frac{\sqrt{3}}{2}
1/2
-3/4
2\frac{1}{3}
\sqrt{2}
\sqrt2
2\sqrt{2}
\sqrt[3]{5}
3+\sqrt{5}
\frac{1+\sqrt{5}}{2}
\pi
2\pi
\frac{\pi}{6}
4\pi^2
e
e^2
\ln 2
\log_2 3
2^{10}
10^{-3}
3 \times 10^{8}
6.02\cdot 10^{23}
5!
\binom{5}{2}
x
x+1
x^2-3x+2
(x-1)(x-2)
y=2x+1
x=5
f(x)=x^2
ax^2+bx+c
\frac{x+1}{x-1}
2i
3+4i
-1-i
e^{i\pi}
(1,2)
(3,-4)
\left(\frac{1}{2},3\right)
(1,2,3)
[0,1]
(0,1]
(-\infty,3)
[2,\infty)
(-\infty,0)\cup(1,\infty)
\{1,2,3\}
\left\{-1, 0, 1\right\}
1,2
1, 2, 3
x>3
x\le 5
1<x<2
x \in [0,1]
\infty
-\infty
\emptyset
\pm 2
3\pm\sqrt{2}
\begin{pmatrix}1&2\\3&4\end{pmatrix}
\begin{pmatrix} 1 \\ 2 \end{pmatrix}
\text{Saturday}
\text{(B)}
A
\text{yes}
\text{even}
0.\overline{3}
\sin x
\cos\frac{\pi}{3}
\tan^{-1} 1
|x|
\lfloor 2.5 \rfloor
n(n+1)/2
\frac{n(n+1)}{2}
12:30
p \vee q
\mathbb{R}
\overrightarrow{AB}
""".strip().splitlines()

WORDS = """
5 dollars
36 dollars
US$5
five
twenty-five
2 hours and 5 minutes
no solution
12 apples
5 miles per hour
5 million
5 percent
two thirds
5 1/2 cups
5 m/s
increasing on (0, 1)
""".strip().splitlines()

FIVES = {"5 dollars", "US$5", "five", "5 miles per hour", "5 percent"}


def judge(response: str, answer: str) -> float:
    return math(prompt="", response=response, answer=answer, metadata={}, finish_reason="stop")


@pytest.mark.parametrize("form", WORDS)
def test_an_answer_in_words_equals_itself_and_no_other(form: str) -> None:
    assert judge(rf"so it is \boxed{{{form}}}.", form) == 1.0
    assert judge(rf"\[\boxed{{{form}}}\]", rf"\boxed{{{form}}}") == 1.0
    equal = {other for other in WORDS if judge(rf"\boxed{{{other}}}", form)}
    assert equal == (FIVES if form in FIVES else {form})


@given(st.text(st.characters(codec="ascii", exclude_characters="\\{}$<"), min_size=1).filter(content_of))
@settings(deadline=None)
def test_any_text_equals_itself_in_a_box(text: str) -> None:
    assert judge(rf"\boxed{{{text}}}", text) == 1.0


@pytest.mark.parametrize("part", [" ", "\n ", r"\[", r"\(", "$ ", "{", "a "])
def test_a_box_that_repeats_itself_is_read_once(part: str) -> None:
    """And not as often as it has characters, or the square of that: then this would take hours."""
    content = 50_000 * part
    assert content_of(rf"\boxed{{{content}}}") in (content.strip(), rf"\boxed{{{content}}}")


def test_rows_that_are_spaced_and_sets_in_delimiters_are_read_whole() -> None:
    rows = r"\begin{pmatrix}1\\[2pt]2\end{pmatrix}"
    assert content_of(rf"\[{rows}\]") == content_of(rf"\({rows}\)") == rows


def test_there_are_many_forms() -> None:
    assert len(FORMS) == len(set(FORMS)) > 80


@pytest.mark.parametrize("form", FORMS)
def test_an_answer_of_every_form_equals_itself_and_nothing_else(form: str) -> None:
    assert judge(rf"so it is \boxed{{{form}}}.", form) == 1.0
    assert judge(rf"$\boxed{{{form}}}$", f"${form}$") == 1.0
    assert judge(rf"\[\boxed{{{form}}}\]", rf"\boxed{{{form}}}") == 1.0
    assert judge(f"The answer is ${form}$.", form) == 1.0
    assert judge(r"\boxed{12321}", form) == 0.0


@pytest.mark.parametrize(
    ("response", "answer", "reward"),
    [
        (r"\boxed{36}", r"\$36", 1.0),
        (r"\boxed{\$36}", "36", 1.0),
        (r"\boxed{\$36}", "$36$", 1.0),
        (r"\boxed{36.00}", r"\$36", 1.0),
        (r"it costs \$36", r"\$36", 1.0),
        ("it costs $36", r"\$36", 1.0),
        (r"\boxed{37}", r"\$36", 0.0),
        (r"\boxed{5}", r"5\text{ cm}", 1.0),
        (r"\boxed{5}", "x=5", 1.0),
        (r"\boxed{\{1,2\}}", r"\{2,1\}", 1.0),
        (r"\boxed{5}", "The answer is $5$.", 1.0),
        (r"\boxed{5}", "The answer is 5.", 1.0),
        (r"\boxed{5}", r"The total is \$5", 1.0),
        (r"\boxed{1200}", r"Answer: \$1,200", 1.0),
        (r"\boxed{5}", "5.", 1.0),
        (r"\boxed{5}", "ratio: 3:5", 0.0),
        (r"\boxed{30}", "10:30 am", 0.0),
        (r"\boxed{B}", "The answer is (B).", 1.0),
        (r"\boxed{1,2}", "$1$ and $2$", 1.0),
        (r"\boxed{}", "5", 0.0),
        (r"\boxed{\frac{}{}}", "5", 0.0),
        ("#### 18", "18", 1.0),
        (r"\boxed{5}", "5 dollars", 1.0),
        (r"\boxed{5}", "US$5", 1.0),
        (r"\boxed{-5}", "-US\\$5", 1.0),
        (r"\boxed{5}", "€5", 1.0),
        (r"\boxed{36}", "36 dollars", 1.0),
        (r"\boxed{36 dollars}", r"\$36", 1.0),
        (r"\boxed{1200}", "1,200 dollars", 1.0),
        (r"\boxed{5}", "five", 1.0),
        (r"\boxed{five}", "5", 1.0),
        (r"\boxed{25}", "twenty-five dollars", 1.0),
        (r"\boxed{5}", "5 miles per hour", 1.0),
        (r"\boxed{18 students}", "18", 1.0),
        (r"\boxed{.05}", "5 percent", 1.0),
        (r"\boxed{6}", "5 dollars", 0.0),
        (r"\boxed{5}", "5 million", 0.0),
        (r"\boxed{2}", "two thirds", 0.0),
        (r"\boxed{5}", "5 tenths", 0.0),
        (r"\boxed{5}", "5 abcd", 0.0),
        (r"\boxed{5}", "5 alpha", 0.0),
        (r"\boxed{2}", "2 hours and 5 minutes", 0.0),
        (r"\boxed{5}", "2 hours and 5 minutes", 0.0),
        (r"\boxed{2\text{ Hours and }5\text{ minutes}.}", "2 hours and 5 minutes", 1.0),
        (r"\boxed{\text{No solution}}", "no solution", 1.0),
        (r"\boxed{silent}", "listen", 0.0),
        (r"\boxed{cba}", "abc", 1.0),
        ("The answer is 36 dollars.", "36 dollars", 1.0),
        ("It costs 36 dollars.", "US$36", 1.0),
    ],
)
def test_money_units_and_sentences_are_read_as_mathematics(response: str, answer: str, reward: float) -> None:
    assert judge(response, answer) == reward


@pytest.mark.parametrize(
    ("response", "right", "wrong"),
    [
        (r"\boxed{1} and \boxed{2}", "2", "1"),
        (r"\boxed{1}, or rather \boxed{2", "1", "2"),
        (r"\boxed{\frac{1}{2}} and \fbox{3}", "3", r"\frac{1}{2}"),
        (r"\boxed{2} because $x = 3$", "2", "3"),
        ("The answer is 4. It is not 5.", "4", "5"),
    ],
)
def test_the_last_closed_box_is_the_answer_before_anything_else(response: str, right: str, wrong: str) -> None:
    assert judge(response, right) == 1.0
    assert judge(response, wrong) == 0.0


def test_the_content_of_a_box_ends_where_its_braces_do() -> None:
    assert last_box(r"{ \boxed {\{1\} \frac{1}{2}} }") == r"\{1\} \frac{1}{2}"
    assert last_box(r"\boxed{\boxed{3}}") == "3"
    assert last_box(r"\boxed{1") is None
    assert last_box("}" * 9 + r"\boxed{" * 50_000) is None


@pytest.mark.parametrize(
    ("response", "said"),
    [
        ("no thoughts", "no thoughts"),
        (r"<think>\boxed{4}</think> so \boxed{5}", r" so \boxed{5}"),
        (r"thought before \boxed{4}</think> 5", " 5"),  # the template of the prompt has opened it
        (r"<think>never done \boxed{4}", ""),
        (r"<think>a</think> b <think>again \boxed{4}", ""),
    ],
)
def test_what_was_thought_is_not_answered(response: str, said: str) -> None:
    assert answer_in(response) == said
    assert judge(response, "4") == 0.0


@pytest.mark.parametrize("answer", ["B", "(B)", r"\text{B}", r"\text{(B)}", r"\boxed{B}", "$B$", "B."])
@pytest.mark.parametrize(
    ("response", "reward"),
    [
        (r"\boxed{B}", 1.0),
        (r"\boxed{b}", 1.0),
        (r"\boxed{\text{(B)}}", 1.0),
        (r"\boxed{\textbf{(B)}\ 36}", 1.0),
        (r"\boxed{C}", 0.0),
        (r"\boxed{Both}", 0.0),
        (r"\boxed{B+1}", 0.0),
        (r"\boxed{B + 1}", 0.0),
        (r"\boxed{(B) + C}", 0.0),
        (r"\boxed{B, C}", 0.0),
        (r"\boxed{B or C}", 0.0),
        (r"\boxed{\text{B}, \text{C}}", 0.0),
        (r"\boxed{B\text{ and }C}", 0.0),
        (r"\boxed{\text{(B) } 36}", 1.0),
        (r"\boxed{B. A train}", 1.0),
        (r"The answer is B, and not \boxed{7}", 0.0),
        ("The answer is B", 1.0),
        ("The answer is (B), because A is wrong.", 1.0),
        ("Answer: **B**", 1.0),
        ("the answer is A. No, the answer is $B$.", 1.0),
        ("the correct option is B", 1.0),
        ("Not A, and not C.\nB", 1.0),
        ("A B C", 0.0),
        ("the answer is better", 0.0),
        ("", 0.0),
    ],
)
def test_a_choice_is_compared_as_a_letter(response: str, answer: str, reward: float) -> None:
    assert judge(response, answer) == reward


@pytest.mark.parametrize("answer", ["", " ", "$$"])
def test_an_answer_that_no_response_could_equal_is_an_error(answer: str) -> None:
    with pytest.raises(ValueError, match="is not a mathematical expression"):
        judge("4", answer)
