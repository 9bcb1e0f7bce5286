"""Tool schemas: the functions that a model may call, as the JSON schemas that chat templates print.

A schema is OpenAI's {"type": "function", "function": {name, description, parameters}}. Data write it out, or give the
signature of a Python function with its docstring, which is parsed and never run:

    def look_up(city: str, days: int = 1) -> str:
        '''Find the weather.

        Args:
            city: Where.
            days: How many.
        '''

The schema of a signature is the one that `transformers.utils.get_json_schema` gives of the function, save that an
argument may lack a type or a description.
"""

import ast
import json
import re
from collections.abc import Callable, Mapping, Sequence

from genai_pl.data.columns import Place, parse_json, preview, refuse, type_name
from genai_pl.errors import ConfigError

Schema = dict[str, object]
SCALARS = {"int": "integer", "float": "number", "str": "string", "bool": "boolean", "None": "null"}
JSON_TYPES = {int: "integer", float: "number", str: "string", bool: "boolean", type(None): "null"}
IS_SIGNATURE = re.compile(r"\s*(async\s+)?(def\s+\w+|\w+\s*\()")
# sections of a docstring in Google's style, and the arguments of one
SECTION = re.compile(r"^[ \t]*(Args|Arguments|Parameters|Returns|Raises|Yields|Examples?):[ \t]*$", re.MULTILINE)
ARGUMENT = re.compile(r"(\w+)\s*(?:\([^)]*\))?:\s*(.*)", re.DOTALL)
CHOICES = re.compile(r"\(choices:\s*(.*?)\)\s*$", re.IGNORECASE)


def parse_tools(value: object, place: Place) -> list[Schema]:
    """The tools that a conversation offers; an empty cell is no tools.

    value: JSON schemas as a list or as JSON text, signatures of Python functions as one text, or a list of either.
    """
    if value is None or value == "":
        return []
    if isinstance(value, str):
        value = [value] if IS_SIGNATURE.match(value) else parse_json(value, place)
    value = [] if value is None else value  # the JSON text null
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        refuse(place, f"{preview(value)} is not a list of tools")
    return [schema for tool in value for schema in _schemas_of(tool, place)]


def function_schema(function: Callable[..., object], option: str) -> Schema:
    """The schema of a function with typed arguments and a docstring; ConfigError names the option that gave it."""
    from transformers.utils import get_json_schema

    try:
        return get_json_schema(function)
    except Exception as error:  # of a user's annotations, which can raise anything
        name = getattr(function, "__name__", repr(function))
        raise ConfigError(f"{option}: {name} is no tool, {' '.join(str(error).split())}") from None


def signature_schemas(source: str) -> list[Schema]:
    """The schemas of all functions whose signatures the source has; ValueError where it is none.

    >>> [schema] = signature_schemas("add(a: int, b: int = 0)")
    >>> schema["function"]["name"], schema["function"]["parameters"]["required"]
    ('add', ['a'])
    """
    functions = [node for node in _parsed(source).body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    if not functions:
        raise ValueError("no function in it")
    return [_schema(function) for function in functions]


def _schemas_of(tool: object, place: Place) -> list[Schema]:
    """The schemas of one entry: an object, with or without OpenAI's wrapper, JSON text, or signatures."""
    if isinstance(tool, str):
        if not IS_SIGNATURE.match(tool):
            return _schemas_of(parse_json(tool, place), place)
        try:
            return signature_schemas(tool)
        except (SyntaxError, ValueError, RecursionError) as error:
            refuse(place, f"{preview(tool)} is not the signature of a Python function ({error})")
    if not isinstance(tool, Mapping):
        refuse(place, f"{preview(tool)} is {type_name(tool)}, not the JSON schema of a tool")
    function = tool.get("function", tool)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        refuse(place, f"the JSON schema of a tool has a function with a name, not {preview(tool)}")
    # templates read the fields of `function`: of a bare one they would print nothing
    return [dict(tool)] if "function" in tool else [{"type": "function", "function": dict(tool)}]


def _parsed(source: str) -> ast.Module:
    """The syntax tree of functions, which may lack `def` and a body."""
    text = source.strip()
    if not re.match(r"(async\s+def|def|@)\b", text):
        text = f"def {text}"
    try:
        return ast.parse(text)
    except SyntaxError:
        return ast.parse(f"{text} ..." if text.endswith(":") else f"{text}: ...")


def _schema(function: ast.FunctionDef | ast.AsyncFunctionDef) -> Schema:
    """The schema of one function: types of its annotations, descriptions of its docstring."""
    sections = _sections(ast.get_docstring(function) or "")
    described = _described(sections.get("Args") or sections.get("Arguments") or sections.get("Parameters") or "")
    arguments = function.args
    if arguments.vararg or arguments.kwarg:
        raise ValueError("arguments with * have no schema")
    # self and cls of a method are no arguments
    positional = [*arguments.posonlyargs, *arguments.args]
    n_required = len(positional) - len(arguments.defaults)
    required = [argument.arg for argument in positional[:n_required]]
    required += [a.arg for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if d is None]
    receiver = positional[0].arg if positional and positional[0].annotation is None else ""
    properties = {}
    for argument in [*positional, *arguments.kwonlyargs]:
        if argument.arg == receiver and receiver in ("self", "cls"):
            continue
        schema = {} if argument.annotation is None else _type(argument.annotation)
        properties[argument.arg] = schema | _description(described.get(argument.arg))
    parameters: Schema = {"type": "object", "properties": properties}
    if required := [name for name in required if name in properties]:
        parameters["required"] = required
    schema = {"name": function.name, "description": sections[""], "parameters": parameters}
    if function.returns is not None:
        returned = _type(function.returns)
        schema["return"] = returned | ({"description": sections["Returns"]} if "Returns" in sections else {})
    return {"type": "function", "function": schema}


def _sections(docstring: str) -> dict[str, str]:
    """The sections of a docstring by name; what stands before the first is under ""."""
    first, *rest = SECTION.split(docstring)
    return {"": first.strip(), **{name: text.strip() for name, text in zip(rest[::2], rest[1::2], strict=True)}}


def _described(section: str) -> dict[str, str]:
    """The descriptions of arguments; a deeper line goes on with the one before it."""
    lines = [line for line in section.split("\n") if line.strip()]
    indent = min((len(line) - len(line.lstrip()) for line in lines[1:]), default=0)  # the first line lost its own
    entries: list[str] = []
    for n, line in enumerate(lines):
        if n == 0 or len(line) - len(line.lstrip()) == indent:
            entries.append(line.strip())
        else:
            entries[-1] += f" {line.strip()}"
    return {match[1]: match[2].strip() for match in map(ARGUMENT.match, entries) if match}


def _description(text: str | None) -> Schema:
    """The description of an argument, and its `(choices: [...])` as an enum."""
    if text is None:
        return {}
    choices = CHOICES.search(text)
    if choices is None:
        return {"description": text}
    return {"enum": json.loads(choices[1]), "description": text[: choices.start()].strip()}


def _type(node: ast.expr) -> Schema:
    """The JSON schema of an annotation; ValueError for a type that JSON has not."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return _type(ast.parse(node.value, mode="eval").body)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return _union(_members(node))
    name = _name(node.value if isinstance(node, ast.Subscript) else node)
    if not isinstance(node, ast.Subscript):
        plain = {"list": "array", "tuple": "array", "dict": "object", "Any": None, **SCALARS}
        if name not in plain:
            raise ValueError(f"{ast.unparse(node)} is no type of JSON")
        return {} if plain[name] is None else {"type": plain[name]}
    # types of others: list[int], dict[str, int], Optional[int], Literal["a", "b"]
    inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    if name == "Literal":
        values = [ast.literal_eval(value) for value in inner]
        if any(type(value) not in JSON_TYPES for value in values):
            raise ValueError(f"{ast.unparse(node)} is no type of JSON")
        types = list(dict.fromkeys(JSON_TYPES[type(value)] for value in values))
        return {"type": types[0] if len(types) == 1 else types, "enum": values}
    if name in ("Optional", "Union"):
        return _union([*inner, *([ast.Constant(None)] if name == "Optional" else [])])
    if name == "list" and len(inner) == 1:
        return {"type": "array", "items": _type(inner[0])}
    if name == "tuple" and len(inner) > 1 and not any(_is_ellipsis(value) for value in inner):
        return {"type": "array", "prefixItems": [_type(value) for value in inner]}
    if name == "dict" and len(inner) == 2:
        return {"type": "object", "additionalProperties": _type(inner[1])}
    raise ValueError(f"{ast.unparse(node)} is no type of JSON")


def _name(node: ast.expr) -> str:
    """The name of a type: `typing.List` is list."""
    name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else None
    if isinstance(node, ast.Constant) and node.value is None:
        return "None"
    if name is None:
        raise ValueError(f"{ast.unparse(node)} is no type of JSON")
    return name.lower() if name in ("List", "Dict", "Tuple") else name


def _members(node: ast.expr) -> list[ast.expr]:
    """The types between the bars of a union."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return [*_members(node.left), *_members(node.right)]
    return [node]


def _union(nodes: Sequence[ast.expr]) -> Schema:
    """The schema of one of several types; None among them makes it nullable."""
    known = [_type(node) for node in nodes]
    inner = [schema for schema in known if schema != {"type": "null"}]
    if len(inner) == 1:
        union = inner[0]
    elif all(schema.keys() == {"type"} and isinstance(schema["type"], str) for schema in inner):
        names = sorted({schema["type"] for schema in inner})
        union = {"type": names[0] if len(names) == 1 else names}
    else:
        union = {"anyOf": inner}
    return union | ({"nullable": True} if len(inner) < len(known) else {})


def _is_ellipsis(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is ...
