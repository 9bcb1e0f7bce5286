"""Conversations in columns: by their shape they become lists of messages with a role and a text."""

from collections.abc import Mapping, Sequence

from genai_pl.data.columns import Place, loads, parse_json, parse_list, parse_text, preview, refuse, type_name

Message = dict[str, object]
TextOrMessages = str | list[Message]  # what is given or said: a text, or messages
SHARE_GPT = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}


def text_or_messages(value: object, place: Place) -> TextOrMessages:
    """What a cell gives to be continued or said: a text, or messages, which a csv can only hold as JSON."""
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
        found = loads(value)
    except (ValueError, RecursionError):
        return False
    keys = [set(entry) if isinstance(entry, Mapping) else set() for entry in found]
    return bool(keys) and all({"role", "content"} <= entry or {"from", "value"} <= entry for entry in keys)


def prepend_system(messages: list[Message], system: object, place: Place) -> list[Message]:
    """The messages after that of the system, which a column beside them may hold."""
    if system is None or system == "":
        return messages
    said = {"role": "system", "content": parse_text(system, place)}
    first = messages[0]
    if first["role"] != "system":
        return [said, *messages]
    if first["content"] != said["content"]:
        refuse(place, f"{preview(said['content'])}, but the conversation begins with another system message")
    return messages


def message_texts(given: TextOrMessages) -> list[str]:
    """The texts of what is given or said."""
    return [given] if isinstance(given, str) else [message["content"] for message in given]


def parse_messages(value: object, place: Place) -> list[Message]:
    """The messages of a cell, which may be written as JSON: role, content (a text) and what else they hold.

    Content in parts is joined, the arguments of calls are parsed. Turns of `from` and `value` (ShareGPT) are taken too.
    """
    found = parse_list(value, place, parse_message)
    if not found:
        refuse(place, "no messages: a conversation has one at least")
    return found


def parse_message(value: object, place: Place) -> Message:
    """One message."""
    if isinstance(value, Mapping) and {"from", "value"} <= set(value) and "role" not in value:
        value = _from_value(value, place)
    if not isinstance(value, Mapping) or not isinstance(value.get("role"), str) or not value["role"]:
        refuse(place, f"messages: each is an object with role and content, not {preview(value)}")
    if value.get("weight") not in (None, 1):
        refuse(place, f"messages: weight {preview(value['weight'])}: every answer is learned; leave the key out")
    message: Message = {"role": value["role"], "content": ""}
    message |= {key: inner for key, inner in value.items() if inner is not None and key != "content"}
    message["content"] = _content(value, place)
    if value.get("tool_calls"):
        message["tool_calls"] = parse_list(value["tool_calls"], place, _call)
    return message


def _from_value(value: Mapping[str, object], place: Place) -> Message:
    role = SHARE_GPT.get(value["from"]) if isinstance(value["from"], str) else None
    if role is None:
        refuse(place, f"messages: from is {preview(value['from'])}, not one of {', '.join(SHARE_GPT)}")
    return {"role": role, "content": value["value"]}


def _content(value: Mapping[str, object], place: Place) -> str:
    content = value.get("content")
    if content is None:
        if not any(value.get(key) for key in ("tool_calls", "reasoning_content", "thinking")):
            refuse(place, f"messages: each is an object with role and content, not {preview(value)}")
        return ""
    return join_parts(
        [_part(part, place) for part in content] if isinstance(content, list) else [parse_text(content, place)]
    )


def _part(part: object, place: Place) -> str:
    if isinstance(part, Mapping) and part.get("type", "text") == "text" and "text" in part:
        part = part["text"]
    elif not isinstance(part, str):
        refuse(place, f"messages: a part of a content is {preview(part)}; only text is read")
    return parse_text(part, place)


def join_parts(parts: Sequence[str]) -> str:
    """The text of a content that comes in parts, in training and in requests."""
    return "".join(parts)


def _call(call: object, place: Place) -> Message:
    """A call of a tool as chat templates read it, which write the JSON of its arguments themselves."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        refuse(place, f"messages: a call in tool_calls is an object with a function and its name, not {preview(call)}")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = parse_json(arguments, place)
    plain = {**function, **({} if arguments is None else {"arguments": arguments})}
    return {**call, "function": plain} if "function" in call else plain


def parse_tools(value: object, place: Place) -> list[Message]:
    """The tools that a conversation offers: JSON schemas, as a list or written as JSON; none where the cell is empty."""
    if value is None or value == "":
        return []
    return parse_list(value, place, _tool)


def _tool(tool: object, place: Place) -> Message:
    if not isinstance(tool, Mapping):
        refuse(place, f"{preview(tool)} is {type_name(tool)}, not the JSON schema of a tool")
    return dict(tool)


def extract_prompt(
    prompt: TextOrMessages | None, answers: Sequence[TextOrMessages], place: Place
) -> tuple[TextOrMessages, list[TextOrMessages]]:
    """A prompt and what is said after it, from answers that may be whole conversations or hold the prompt themselves.

    Without a prompt it is what all answers begin with, as TRL's extract_prompt has it: messages, or characters.
    """
    talks = [answer for answer in answers if not isinstance(answer, str)]
    if prompt is None:
        if talks and len(talks) < len(answers):
            refuse(place, "answers are texts and conversations; give one kind, or a prompt")
        begun = common_prefix_length(answers)
        if not begun:
            refuse(place, "the answers do not begin alike, so there is no prompt in them; give a column prompt")
        return answers[0][:begun], [answer[begun:] for answer in answers]
    if not talks:
        return prompt, list(answers)
    asked = _prompt_messages(prompt, talks, place)
    said = [answer if isinstance(answer, str) else _strip_prompt(asked, answer, place) for answer in answers]
    return asked, said


def _prompt_messages(prompt: TextOrMessages, talks: list[list[Message]], place: Place) -> list[Message]:
    """The prompt as messages: as they are, or those up to the one that the conversations have in common with the text."""
    if not isinstance(prompt, str):
        return prompt
    if all(talk[0]["role"] == "assistant" for talk in talks):
        return [{"role": "user", "content": prompt}]
    begun = common_prefix_length(talks) if len(talks) > 1 else _prompt_end(talks[0], prompt)
    if not _prompt_end(talks[0][:begun], prompt):
        refuse(place, f"the conversations do not begin with the prompt {preview(prompt)}; give it as messages")
    return talks[0][:begun]


def _prompt_end(talk: list[Message], prompt: str) -> int:
    """How many messages there are up to the first one in which the user says the prompt; 0 where none does."""
    said = (message["role"] == "user" and message["content"].strip() == prompt.strip() for message in talk)
    return next((n for n, found in enumerate(said, start=1) if found), 0)


def _strip_prompt(asked: list[Message], answer: list[Message], place: Place) -> list[Message]:
    """The answer without the prompt that it may begin with."""
    rest = answer[len(asked) :] if answer[: len(asked)] == asked else answer
    if all(message["role"] != "assistant" for message in rest):
        refuse(place, "an answer in which the assistant says nothing")
    return rest


def common_prefix_length(answers: Sequence[Sequence]) -> int:
    """How many messages or characters all answers begin with; a space before the first other character is not counted.

    >>> common_prefix_length(["It is blue.", "It is green."]), common_prefix_length(["Be calm", "Be cold"])
    (5, 4)
    """
    first, shortest = answers[0], min(map(len, answers))
    n = next((n for n in range(shortest) if any(answer[n] != first[n] for answer in answers)), None)
    if n is None:  # all the same: something must be left to say
        return shortest - 1
    return n - 1 if n and first[n - 1] == " " else n
