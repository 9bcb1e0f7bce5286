"""Tools of a column: schemas, their JSON, and signatures of Python functions, which transformers reads alike."""

import json

import pytest
from transformers.utils import get_json_schema

from genai_pl.data.columns import Place
from genai_pl.data.tool_schemas import function_schema, parse_tools, signature_schemas
from genai_pl.errors import ConfigError, DataError

HERE = Place("rows.jsonl", 3, "tools")
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}
PLAIN = '''
def look_up(city: str, days: int = 1) -> str:
    """Find the weather.

    Args:
        city: Where,
            in one word.
        days: How many.

    Returns:
        What it will be.
    """
'''
TYPES = '''
from typing import Literal, Optional, Union, Any


def types(
    a: float, b: bool, c: list[int], d: dict[str, float], e: Optional[int], f: int | str | None, g: Literal["x", "y"],
    h: list, i: dict, j: tuple[int, str], k: Union[list[int], str], l: Any = None, *, m: "int" = 3, n: str = "",
):
    """Take all types. Say: nothing.

    Args:
        a: One.
        b: Two
        c: Three
        d: Four
        e: Five
        f: Six
        g: Seven
        h: Eight
        i: Nine
        j: Ten
        k: Eleven
        l: Twelve
        m: Thirteen
        n: Fourteen (choices: ["p", "q"])
    """
'''
METHOD = '''
class Shop:
    def price(self, item: str) -> float:
        """The price of an item.

        Args:
            item: A word
        """
'''


def of_python(source: str, name: str) -> dict:
    """The schema that transformers makes of the function."""
    scope: dict[str, object] = {}
    exec(source, scope)
    return get_json_schema(scope[name] if name in scope else getattr(scope["Shop"], name))


@pytest.mark.parametrize(("source", "name"), [(PLAIN, "look_up"), (TYPES, "types")])
def test_a_signature_has_the_schema_that_transformers_makes_of_the_function(source: str, name: str) -> None:
    signature = source[source.index("def ") :]
    assert json.dumps(signature_schemas(signature)) == json.dumps([of_python(source, name)])


def test_the_receiver_of_a_method_is_no_argument() -> None:
    method = METHOD.split("class Shop:\n")[1]
    import textwrap

    assert signature_schemas(textwrap.dedent(method)) == [of_python(METHOD, "price")]


def test_a_bare_signature_and_several_functions_are_read() -> None:
    [schema] = signature_schemas("look_up(city: str, days=1) -> str")
    properties = {"city": {"type": "string"}, "days": {}}
    assert schema["function"]["parameters"] == {"type": "object", "properties": properties, "required": ["city"]}
    names = [schema["function"]["name"] for schema in parse_tools("def a(x: int): ...\ndef b(): ...", HERE)]
    assert names == ["a", "b"]


def test_tools_are_a_list_its_json_or_signatures() -> None:
    assert parse_tools([TOOL], HERE) == parse_tools(json.dumps([TOOL]), HERE) == [TOOL]
    assert parse_tools([json.dumps(TOOL)], HERE) == parse_tools(TOOL, HERE) == [TOOL]
    assert parse_tools([TOOL["function"]], HERE) == [TOOL]  # without OpenAI's wrapper, which templates read
    assert parse_tools(None, HERE) == parse_tools("", HERE) == []
    assert parse_tools([TOOL, PLAIN], HERE)[1]["function"]["name"] == "look_up"


@pytest.mark.parametrize(
    "value",
    [
        "no json", [1], 3, [{"type": "function"}], [{"function": {"name": 1}}], "def f(x: set): ...", "def f(*x): ...",
        "def f(x: tuple[int, ...]): ...", "def f(", "f(x: Literal[b'a'])", "def f(x: int.3): ...",
    ],
)  # fmt: skip
def test_what_is_no_tool_is_refused_by_row(value: object) -> None:
    with pytest.raises(DataError, match="row 3"):
        parse_tools(value, HERE)


def test_a_function_without_types_or_a_docstring_is_refused_in_one_line() -> None:
    def bare(x):
        return x

    with pytest.raises(ConfigError, match=r"objective.environment: bare is no tool, .*docstring") as raised:
        function_schema(bare, "objective.environment")
    assert "\n" not in str(raised.value)
