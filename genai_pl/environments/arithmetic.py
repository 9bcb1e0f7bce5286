"""Arithmetic: the value of an expression by its syntax tree, with bounds on time and memory; nothing is executed."""

import ast
import math
import operator
import re
from decimal import Context

OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}
FUNCTIONS = {"abs": abs, "min": min, "max": max, "round": round, "sqrt": math.sqrt, "gcd": math.gcd, "lcm": math.lcm}
MAX_LENGTH, MAX_BITS = 500, 4096  # characters of an expression, bits of a whole number
LONG = 10**30  # whole numbers from here on are rounded


def evaluate(expression: str) -> int | float:
    """The value of an expression of numbers, + - * / // % **, brackets and FUNCTIONS; ValueError for anything else.

    >>> evaluate("(2 + 3) * 4 ** 2"), evaluate("7 / 2")
    (80, 3.5)
    """
    if len(expression) > MAX_LENGTH:
        raise ValueError(f"an expression of more than {MAX_LENGTH} characters")
    try:
        return _value(ast.parse(_cleaned(expression), mode="eval").body)
    except (SyntaxError, RecursionError, MemoryError):
        raise ValueError(f"{expression!r} is not arithmetic") from None
    except TypeError:
        raise ValueError(f"{expression!r} has a function with other arguments than it takes") from None
    except ZeroDivisionError:
        raise ValueError("division by zero") from None
    except OverflowError:
        raise ValueError("the result is too large") from None


def _cleaned(expression: str) -> str:
    """The expression in Python's spelling: ** for ^, and no commas between digits, where they are not of a function."""
    text = expression.strip().replace("^", "**")
    return text if re.search(r"[a-z]", text) else re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)


def _value(node: ast.expr) -> int | float:
    """The value of a node of the tree."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return _bounded(node.value)
    if isinstance(node, ast.UnaryOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](_value(node.operand))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        return _power(_value(node.left), _value(node.right))
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return _bounded(OPERATORS[type(node.op)](_value(node.left), _value(node.right)))
    if (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in FUNCTIONS
        and not node.keywords
    ):
        return _bounded(FUNCTIONS[node.func.id](*map(_value, node.args)))
    raise ValueError(f"{ast.unparse(node)} is not arithmetic")


def _power(base: int | float, exponent: int | float) -> int | float:
    """base ** exponent, refused before it is computed where the result would be too large."""
    if abs(base) > 1 and abs(exponent) * math.log2(abs(base)) > MAX_BITS:
        raise OverflowError
    value = base**exponent
    if isinstance(value, complex):
        raise ValueError("the result is no real number")
    return _bounded(value)


def _bounded(value: int | float) -> int | float:
    """The value, if it is a finite number of not too many digits."""
    if isinstance(value, float) and not math.isfinite(value):
        raise OverflowError
    if isinstance(value, int) and value.bit_length() > MAX_BITS:
        raise OverflowError
    return value


def number_text(value: int | float) -> str:
    """The number as a person writes it: in at most 12 digits, no point where it is whole.

    >>> number_text(4.0), number_text(0.1 + 0.2), number_text(1e-12), number_text(10**400)
    ('4', '0.3', '1e-12', '1e+400')
    """
    if isinstance(value, int) and abs(value) < LONG:
        return str(value)
    if isinstance(value, float):
        return f"{value:.12g}"
    return str(Context(prec=12).create_decimal(value).normalize()).lower()  # a float would not hold it
