"""Requests of every route by chance: valid ones, nearly valid ones and hostile ones, each known by the seed and its number."""

import json
import re
import socket
import struct
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from random import Random
from urllib.parse import quote

ADMIN = {"authorization": "Bearer admin"}
TOOL = {
    "name": "weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
FUNCTION = {"type": "function", "function": TOOL}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "dry", "tool_call_id": "c1"},
    {"role": "user", "content": "And now?"},
]
ASKED = [{"role": "user", "content": "Hello"}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
SAMPLED = {"temperature": 0.8, "top_p": 0.9, "top_k": 5, "min_p": 0.05, "seed": 7, "repetition_penalty": 1.2}
PENALTIES = {"presence_penalty": 0.5, "frequency_penalty": -0.5, "logit_bias": {"65": 5.0}}
BLOCKS = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": [{"type": "tool_use", "id": "c", "name": "weather", "input": {"city": "Bern"}}]},
    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": "dry"}]},
]
ITEMS = [
    {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hello"}]},
    {"type": "function_call", "call_id": "c", "name": "weather", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "c", "output": "dry"},
    {"role": "user", "content": "And now?"},
]
CLAUDE = {"name": "weather", "input_schema": TOOL["parameters"]}
# right bodies of each route that takes one, from which others are made
BODIES: dict[str, list[dict]] = {
    "/generate": [
        {"prompt": "Once"},
        {"prompt": "Once upon", "max_new_tokens": 4, "stop": ["a"], **SAMPLED, "stream": True},
        {"prompt": "Once", "adapter": "polite", **PENALTIES},
    ],
    "/score": [{"text": "a king"}, {"text": ["a", "b"], "prompt": ["x", "y"]}, {"text": "a", "prompt": ASKED}],
    "/v1/completions": [
        {"prompt": "Once", "max_tokens": 4, "logprobs": 3, "n": 2, **SAMPLED},
        {"prompt": ["Once", "upon"], "max_tokens": 2, "stream": True, "stream_options": {"include_usage": True}},
        {"prompt": [72, 101], "model": "polite", "echo": True, "max_tokens": 0, "logprobs": 1},
        {"prompt": "x", "max_tokens": 8, "guided_regex": "[0-9]{3}"},
        {"prompt": "x", "max_tokens": 8, "guided_choice": ["yes", "no"], "suffix": "", **PENALTIES},
        {"prompt": "x", "max_tokens": 8, "structured_outputs": {"json": SCHEMA}},
    ],
    "/v1/chat/completions": [
        {"messages": TURNS, "max_tokens": 4, "tools": [FUNCTION], "tool_choice": "auto"},
        {"messages": ASKED, "max_completion_tokens": 4, "logprobs": True, "top_logprobs": 2, "stream": True, "n": 2},
        {"messages": ASKED, "max_tokens": 8, "tools": [FUNCTION], "tool_choice": "required"},
        {"messages": ASKED, "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
        {
            "messages": ASKED,
            "max_tokens": 4,
            "chat_template_kwargs": {"enable_thinking": False},
            "reasoning_effort": "low",
        },
    ],
    "/v1/embeddings": [{"input": ["a", "b"]}, {"input": [[72, 101]], "encoding_format": "base64", "dimensions": 4}],
    "/v1/responses": [
        {"input": "Hello", "max_output_tokens": 4, "instructions": "Be brief.", "metadata": {"a": "b"}},
        {"input": ITEMS, "max_output_tokens": 4, "stream": True, "tools": [{"type": "function", **TOOL}]},
        {"input": "x", "max_output_tokens": 8, "text": {"format": {"type": "json_object"}}, "store": False},
        {"input": "x", "max_output_tokens": 4, "reasoning": {"effort": "low", "summary": "auto"}},
    ],
    "/v1/responses/{name}/cancel": [{}],
    "/v1/responses/input_tokens": [{"input": ITEMS, "instructions": "Be brief.", "reasoning": {"effort": "none"}}],
    "/v1/messages": [
        {"model": "tiny", "max_tokens": 4, "messages": BLOCKS, "tools": [CLAUDE], "tool_choice": {"type": "auto"}},
        {"model": "tiny", "max_tokens": 4, "messages": ASKED, "stream": True, "system": "Be brief."},
        {"model": "tiny", "max_tokens": 8, "messages": ASKED, "thinking": {"type": "enabled", "budget_tokens": 1024}},
        {
            "model": "tiny",
            "max_tokens": 8,
            "messages": ASKED,
            "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}, "effort": "low"},
        },
    ],
    "/v1/messages/count_tokens": [{"model": "tiny", "messages": BLOCKS, "tools": [CLAUDE]}],
    "/tokenize": [{"prompt": "Once", "return_token_strs": True}, {"messages": TURNS, "tools": [FUNCTION]}],
    "/detokenize": [{"tokens": [72, 101]}],
    "/classify": [{"input": ["a", "b"]}, {"input": "a", "text_pair": "b"}, {"input": [[72, 101]]}],
    "/rerank": [{"query": "tea", "documents": ["a", {"text": "b"}], "top_n": 1, "return_documents": False}],
    "/v1/score": [{"text_1": "tea", "text_2": ["a", "b"]}, {"queries": ["a", "b"], "documents": ["c", "d"]}],
    "/admin/adapters": [{"name": "polite", "path": "polite"}, {"name": "kind", "path": "polite"}],
}
BODIES |= dict.fromkeys(("/v1/rerank", "/v2/rerank"), BODIES["/rerank"])
BODIES |= {"/v1/classify": BODIES["/classify"]}
DEEP: object = "deep"
for _ in range(60):
    DEEP = [DEEP] if _ % 2 else {"type": "array", "items": DEEP}
HOSTILE: list[object] = [
    *(None, True, False, 0, 1, -1, 2, 3, 8, 2**31 - 1, 2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**63), 10**40),
    *(0.0, -0.0, 0.5, 1e-320, 1e308, -1e308, float("nan"), float("inf"), float("-inf")),
    *(
        "",
        " ",
        "a",
        "auto",
        "none",
        "user",
        "text",
        "\x00",
        "\ud800",
        "\udfff\ud800",
        "🙂",
        "ä" * 300,
        "x" * 5000,
        "\n" * 200,
    ),
    *("../../etc/passwd", "{{ 7 * 7 }}", "{% for i in range(10**9) %}{% endfor %}", "tiny", "polite", "1", "NaN"),
    *("(a*)*b", "[", "(?P<a", "a{1000000}", "(a{1000}){1000}", "\\", "\\p{Zzz}", "(?=a)", "^$", ".*" * 400),
    *([], {}, [[]], [None], [{}], {"": None}, {"a": {"b": []}}, [[[[[]]]]], [1.5], ["a", 1], [-1], [2**40], ["\ud800"]),
    *(
        {"$ref": "#"},
        {"$ref": "http://127.0.0.1:1/x"},
        {"type": "no"},
        {"enum": []},
        {"pattern": "("},
        {"allOf": [SCHEMA] * 50},
    ),
    *({"minLength": 10**9}, {"minItems": 10**9}, {"maximum": -1, "minimum": 1}, {"const": "\ud800"}, {"required": "a"}),
    *(
        {"type": "json_schema"},
        {"type": "function", "function": {"name": "none"}},
        {"-1": 1},
        {"99999999999": 1},
        {"65": 101},
    ),
    *([65] * 200, ["a"] * 40, [{"role": "user", "content": "x"}] * 60, {f"k{n}": n for n in range(200)}, DEEP),
]
KINDS = ["application/json"] * 30
KINDS += ["text/plain", "", "multipart/form-data; boundary=x", "application/json; charset=utf-16"]
RAW = [
    *(b"", b"null", b"[]", b"{", b"}", b'"', b"\xff\xfe", b"\xef\xbb\xbf{}", b"nan", b"[" * 9000, b'{"a":' * 3000),
    *(b"1e999999", b"9" * 5000, b'{"prompt": "x", "prompt": 1}', b"{}{}", b"\x00" * 50, b"a=b&c=d"),
    *(b"--x\r\n\r\n--x--", b'{"prompt": "\xed\xa0\x80"}'),
]
NAMES = ["polite", "tiny", "resp_0", "", "..", "a" * 3000, "🙂", "\x00", "%", "a/b", "?", "#", b"\xed\xbf\xbf"]
ODD_NAMES = ["best_of", "x", "\ud800", "", "a" * 300]


@dataclass
class Sent:
    """One request. leaves: bytes of the answer after which the client closes the connection, None for one that stays."""

    number: int
    method: str
    path: str
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)
    leaves: int | None = None


class Requests:
    """Requests to the routes of an OpenAPI description, without end.

    known: names of resources that exist, which the caller may add to (responses)
    """

    def __init__(self, description: dict, seed: int) -> None:
        self.seed, self.known = seed, list(NAMES)
        self.routes = [(path, method) for path, methods in description["paths"].items() for method in methods]
        # routes with bodies are where most can go wrong
        self.weights = [6 if method == "post" else 1 for _, method in self.routes]
        parts = description["components"]["schemas"].values()
        self.fields = sorted({name for part in parts for name in part.get("properties", ())})

    def __iter__(self) -> Iterator[Sent]:
        number = 0
        while True:
            yield self.make(number)
            number += 1

    def make(self, number: int) -> Sent:
        """Request `number`; the same for a seed, but for names that were added."""
        random = Random(f"{self.seed} {number}")
        path, method = random.choices(self.routes, self.weights)[0]
        bodies = BODIES.get(path, [{}])
        path = re.sub(r"\{[^}]*\}", lambda _: quote(random.choice(self.known), safe=""), path)
        headers = dict(ADMIN) if path.startswith("/admin") and random.random() < 0.9 else {}
        if random.random() < 0.02:
            method, path = (
                random.choice(["get", "put", "patch", "head", "post"]),
                path + random.choice(["/", "//", "/x", "?a=b"]),
            )
        if method != "post":
            return Sent(number, method.upper(), path, b"", headers)
        body = self.body(random, bodies)
        headers["content-type"] = random.choice(KINDS)
        leaves = random.choice([0, 0, 1, 200, 400]) if random.random() < 0.12 else None
        return Sent(number, "POST", path, body, headers, leaves)

    def body(self, random: Random, bodies: Sequence[dict]) -> bytes:
        """A body: as it is, spoiled in a few places, or not JSON."""
        if random.random() < 0.06:
            return random.choice(RAW)
        value: object = deepcopy(random.choice(bodies))
        for _ in range(random.choice([0, 0, 0, 1, 1, 2])):
            value = self.spoil(random, value)
        if random.random() < 0.1 and isinstance(value, dict):
            value["stream"] = True
        text = json.dumps(value, ensure_ascii=random.random() < 0.9).encode("utf-8", "surrogatepass")
        if random.random() < 0.04:
            at = random.randrange(len(text) + 1)
            text = (
                text[:at]
                + random.choice([b"", b"\x00", b"\xff", b",", b"}", b"NaN"])
                + text[at + random.choice([0, 1, 40]) :]
            )
        return text

    def spoil(self, random: Random, value: object) -> object:
        """The value with one place of it changed, left out, repeated or added."""
        places = list(walk(value))
        if not places or random.random() < 0.02:
            return random.choice(HOSTILE)
        holder, key = random.choice(places)
        way = random.random()
        if way < 0.6:
            holder[key] = deepcopy(random.choice(HOSTILE))
        elif way < 0.7:
            del holder[key]
        elif way < 0.75:
            holder[key] = [deepcopy(holder[key]) for _ in range(random.choice([2, 30]))]
        elif way < 0.8:
            other, place = random.choice(places)
            holder[key] = deepcopy(other[place])
        elif isinstance(holder, dict):
            name = random.choice(self.fields if random.random() < 0.85 else ODD_NAMES)
            holder[name] = deepcopy(random.choice(HOSTILE))
        else:
            holder.append(deepcopy(random.choice(HOSTILE)))
        return value


def walk(value: object) -> Iterator[tuple[dict | list, object]]:
    """Every (holder, key) in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        yield value, key
        yield from walk(inner)


def leave(place: tuple[str, int], sent: Sent, timeout: float) -> None:
    """Send a request and close the connection after so many bytes of the answer: at once, politely or by a reset."""
    headers = {"host": "x", "connection": "close", "content-length": str(len(sent.body)), **sent.headers}
    lines = [f"{sent.method} {sent.path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items() if value)]
    head = "\r\n".join([*lines, "\r\n"])
    with socket.create_connection(place, timeout=timeout) as raw:
        is_cut = sent.leaves == 0 and sent.number % 2
        raw.sendall(head.encode() + (sent.body[: len(sent.body) // 2] if is_cut else sent.body))
        n = 0
        while n < sent.leaves and (part := raw.recv(sent.leaves - n)):
            n += len(part)
        if sent.number % 3 == 0:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
