"""Conversations in columns, parsed into lists of messages {"role": ..., "content": text, ...}.

Accepted spellings: OpenAI's messages, content in text parts, `tool_calls` with arguments as objects or JSON text, and
ShareGPT's {"from", "value"}. All of them leave this module in one form, so later stages need not know the
origin of a conversation. What cannot be represented (an image part, a weight per message) is refused by row.
"""

from collections.abc import Mapping, Sequence

from genai_pl.data.assistant_spans import REASONING_KEYS
from genai_pl.data.columns import Place, loads, parse_json, parse_list, parse_text, preview, refuse

LOSS_WEIGHT = "loss_weight"  # of LLaMA-Factory's messages: 1 where a turn is learned, 0 elsewhere
TEXT_PARTS = ("text", "input_text", "output_text")  # types of parts with a text: of chat completions and of responses
Message = dict[str, object]
TextOrMessages = str | list[Message]  # a prompt or an answer
# who speaks in turns of {from, value}: ShareGPT's names, those of its other chat bots, and LLaMA-Factory's for tools
SHARE_GPT = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "system": "system",
}
ROLES = {"developer": "system", "function": "tool"}  # OpenAI's newer and former names
MEDIA = ("images", "image", "videos", "video", "audios", "audio")  # columns of what a text refers to and no model reads


def text_or_messages(value: object, place: Place) -> TextOrMessages:
    """The prompt or answer of a cell: a text, or messages; a csv can hold messages only as JSON."""
    if isinstance(value, list) or (place.name.lower().endswith(".csv") and is_json_messages(value)):
        return parse_messages(value, place)
    return parse_text(value, place)


def is_json_messages(value: object) -> bool:
    """Whether a cell is the JSON text of messages.

    >>> is_json_messages('[{"role": "user", "content": "a"}]'), is_json_messages("[1]"), is_json_messages("a")
    (True, False, False)
    """
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return False
    try:
        entries = loads(value)
    except (ValueError, RecursionError):
        return False
    keys = [set(entry) if isinstance(entry, Mapping) else set() for entry in entries]
    return bool(keys) and all({"role", "content"} <= entry or {"from", "value"} <= entry for entry in keys)


def prepend_system(messages: list[Message], system: object, place: Place) -> list[Message]:
    """The messages after a system message from a column of its own; DataError if they begin with another one."""
    if system is None or system == "":
        return messages
    message = {"role": "system", "content": parse_text(system, place)}
    first = messages[0]
    if first["role"] != "system":
        return [message, *messages]
    if first["content"] != message["content"]:
        refuse(place, f"{preview(message['content'])}, but the conversation begins with another system message")
    return messages


def message_texts(value: TextOrMessages) -> list[str]:
    """The texts of a prompt or answer: itself, or the contents of its messages."""
    return [value] if isinstance(value, str) else [message["content"] for message in value]


def refuse_media(record: Mapping[str, object], place: Place) -> None:
    """DataError for a row with images, videos or sounds: without them its text speaks of what the model never saw."""
    column = next((column for column in MEDIA if record.get(column)), None)
    if column:
        refuse(place.at(column), f"{preview(record[column])}: only text is read; leave the row out, or the column")


def parse_messages(value: object, place: Place) -> list[Message]:
    """The messages of a cell, which may be written as JSON; at least one.

    Content in parts is joined, and arguments of calls are parsed from JSON text.
    """
    messages = parse_list(value, place, parse_message)
    if not messages:
        refuse(place, "no messages: a conversation has one at least")
    return messages


def parse_message(value: object, place: Place) -> Message:
    """One message with role, content (a text) and its other keys; DataError for anything else."""
    if type(value) is dict and len(value) == 2:  # nearly all messages: two texts and nothing to convert
        role, content = value.get("role"), value.get("content")
        if type(content) is str and type(role) is str and role and role not in ROLES:
            return {"role": role, "content": parse_text(content, place)}
    # normalize ShareGPT's keys, then check what every message needs
    if isinstance(value, Mapping) and {"from", "value"} <= set(value) and "role" not in value:
        value = _from_value(value, place)
    if not isinstance(value, Mapping) or not isinstance(value.get("role"), str) or not value["role"]:
        refuse(place, f"messages: each is an object with role and content, not {preview(value)}")
    if value.get("weight") not in (None, 1):
        refuse(place, f"messages: weight {preview(value['weight'])}: every answer is learned; leave the key out")
    if value.get(LOSS_WEIGHT) not in (None, int(value["role"] == "assistant")):
        refuse(
            place, f"messages: {LOSS_WEIGHT} {preview(value[LOSS_WEIGHT])} of the role {value['role']}: "
            "every answer is learned, and nothing else; leave the key out"
        )  # fmt: skip
    value = _in_use(value)
    message: Message = {"role": value["role"], "content": ""}
    own = ("content", "tool_calls", LOSS_WEIGHT)
    message |= {key: inner for key, inner in value.items() if inner is not None and key not in own}
    message["content"] = _content(value, place)
    calls = parse_list(value.get("tool_calls") or [], place, _call)
    return {**message, "tool_calls": calls} if calls else message  # an empty list would pass for a call in templates


def _in_use(value: Mapping[str, object]) -> Mapping[str, object]:
    """The message with OpenAI's former `function_call` as a call, and roles by the names that chat templates know."""
    if value["role"] in ROLES:
        return {**value, "role": ROLES[value["role"]]}
    if not value.get("function_call") or value.get("tool_calls"):
        return value
    rest = {key: inner for key, inner in value.items() if key != "function_call"}
    return {**rest, "tool_calls": _as_functions([value["function_call"]])}


def _from_value(value: Mapping[str, object], place: Place) -> Message:
    """A message of ShareGPT's turn {from, value}."""
    role = SHARE_GPT.get(value["from"]) if isinstance(value["from"], str) else None
    if role is None:
        refuse(place, f"messages: from is {preview(value['from'])}, not one of {', '.join(SHARE_GPT)}")
    if value["from"] == "function_call":  # one call, or a list of them
        calls = parse_json(value["value"], place) if isinstance(value["value"], str) else value["value"]
        return {"role": role, "tool_calls": _as_functions(calls if isinstance(calls, list) else [calls])}
    return {"role": role, "content": value["value"]}


def _as_functions(calls: list) -> list:
    """Calls {name, arguments} as OpenAI writes them, each under `function`."""
    return [{"type": "function", "function": call} if isinstance(call, Mapping) else call for call in calls]


def _content(value: Mapping[str, object], place: Place) -> str:
    """The content as a text; it may be missing only where there are tool calls or thoughts."""
    content = value.get("content")
    if content is None:
        if not any(value.get(key) for key in ("tool_calls", *REASONING_KEYS)):
            refuse(place, f"messages: each is an object with role and content, not {preview(value)}")
        return ""
    return join_parts(
        [_part(part, place) for part in content] if isinstance(content, list) else [parse_text(content, place)]
    )


def _part(part: object, place: Place) -> str:
    """The text of a part of a content."""
    kind = part.get("type", "text") if isinstance(part, Mapping) else None
    if kind in TEXT_PARTS and ("text" in part or "value" in part):  # value: LLaMA-Factory's parts
        part = part["text"] if "text" in part else part["value"]
    elif not isinstance(part, str):
        what = f"of type {preview(kind)}, " if kind is not None and kind not in TEXT_PARTS else ""
        refuse(place, f"messages: a part of a content is {what}{preview(part)}; only text is read")
    return parse_text(part, place)


def join_parts(parts: Sequence[str]) -> str:
    """The text of a content that comes in parts; training and the server join them alike."""
    return "".join(parts)


def _call(call: object, place: Place) -> Message:
    """A tool call as OpenAI writes it, with its arguments as an object; none are an empty one.

    Chat templates serialize the arguments themselves; JSON text would be escaped a second time.
    """
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        refuse(place, f"messages: a call in tool_calls is an object with a function and its name, not {preview(call)}")
    arguments = _arguments(function.get("arguments"))
    if arguments is None:
        refuse(
            place, f"messages: the arguments of a call are an object, or its JSON text, not {preview(function['arguments'])}"
        )  # fmt: skip
    outer = call if "function" in call else {}
    wrapper = outer if outer.get("type") else {"type": "function", **{k: v for k, v in outer.items() if k != "type"}}
    return {**wrapper, "function": {**function, "arguments": arguments}}


def _arguments(value: object) -> Mapping[str, object] | None:
    """Arguments as an object, from JSON text that may have been written as JSON once more; None for anything else."""
    for _ in range(2):
        if isinstance(value, str):
            try:
                value = loads(value) if value.strip() else {}
            except (ValueError, RecursionError):
                return None
    value = {} if value is None else value
    return value if isinstance(value, Mapping) else None


def extract_prompt(
    prompt: TextOrMessages | None, answers: Sequence[TextOrMessages], place: Place
) -> tuple[TextOrMessages, list[TextOrMessages]]:
    """The prompt and the answers after it, from answers that may be whole conversations or repeat the prompt.

    prompt: the prompt of the row, or None where it has to be found: it is then the common prefix of all answers, in
        messages or characters, as in TRL's extract_prompt.
    answers: at least one; all texts or all messages if there is no prompt.

    Returned prompt and answers are of one type each; DataError where the answers share no prompt.
    """
    conversations = [answer for answer in answers if not isinstance(answer, str)]
    if prompt is None:
        if conversations and len(conversations) < len(answers):
            refuse(place, "answers are texts and conversations; give one kind, or a prompt")
        n_prompt = common_prefix_length(answers)
        if not n_prompt:
            refuse(place, "the answers do not begin alike, so there is no prompt in them; give a column prompt")
        return answers[0][:n_prompt], [answer[n_prompt:] for answer in answers]
    # with a prompt: texts follow it as they are, conversations may repeat it
    if not conversations:
        return prompt, list(answers)
    messages = _prompt_messages(prompt, conversations, place)
    completions = [answer if isinstance(answer, str) else _strip_prompt(messages, answer, place) for answer in answers]
    return messages, completions


def _prompt_messages(prompt: TextOrMessages, conversations: list[list[Message]], place: Place) -> list[Message]:
    """The prompt as messages.

    A text is matched against the conversations: their common messages end with the user's turn of that text. Conversations
    that begin with an answer have the text as the user's only message.
    """
    if not isinstance(prompt, str):
        return prompt
    if all(conversation[0]["role"] == "assistant" for conversation in conversations):
        return [{"role": "user", "content": prompt}]
    n_prompt = common_prefix_length(conversations) if len(conversations) > 1 else _prompt_end(conversations[0], prompt)
    if not _prompt_end(conversations[0][:n_prompt], prompt):
        refuse(place, f"the conversations do not begin with the prompt {preview(prompt)}; give it as messages")
    return conversations[0][:n_prompt]


def _prompt_end(conversation: list[Message], prompt: str) -> int:
    """The number of messages up to the first user message that is the prompt; 0 if none is."""
    matches = (message["role"] == "user" and message["content"].strip() == prompt.strip() for message in conversation)
    return next((n for n, match in enumerate(matches, start=1) if match), 0)


def _strip_prompt(prompt: list[Message], answer: list[Message], place: Place) -> list[Message]:
    """The answer without the prompt that it may begin with; DataError if no assistant speaks in it."""
    rest = answer[len(prompt) :] if answer[: len(prompt)] == prompt else answer
    if all(message["role"] != "assistant" for message in rest):
        refuse(place, "an answer in which the assistant says nothing")
    return rest


def common_prefix_length(answers: Sequence[Sequence]) -> int:
    """The length of the prefix that all answers share, in messages or characters.

    A space before the first difference belongs to the answers, as tokenizers join it to the next word.

    >>> common_prefix_length(["It is blue.", "It is green."]), common_prefix_length(["Be calm", "Be cold"])
    (5, 4)
    """
    first, shortest = answers[0], min(map(len, answers))
    n = next((n for n in range(shortest) if any(answer[n] != first[n] for answer in answers)), None)
    if n is None:  # identical answers: each keeps its last element
        return shortest - 1
    return n - 1 if n and first[n - 1] == " " else n
