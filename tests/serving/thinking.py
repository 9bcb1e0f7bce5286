"""Model whose chat template has tools and thoughts, for the tests of routes; and answers that such a model writes."""

from pathlib import Path

from tests.serving.servers import write_model

# as those of Hermes and Qwen3, in short
TEMPLATE = (
    "{% if tools %}{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}{% endif %}"
    "{% for message in messages %}{{ message.role }}: "
    "{% if message.reasoning_content %}<think>\n{{ message.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}{{ '\\n' }}"
    "{% endfor %}{% if reasoning_effort is defined %}effort {{ reasoning_effort }}\n{% endif %}"
    "{% if add_generation_prompt %}assistant: {% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
CALLS = ["Let me see. <tool_", 'call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n', "</tool_call>"]
THOUGHTS = ["<thi", "nk>\nLet me ", "look.\n", "Outside.\n</th", "ink>\n", "\nIt is", " dry."]


def write_thinking_model(folder: Path) -> Path:
    """The folder, with a tiny random model and this template."""
    folder = write_model(folder, template=False, max_seq_len=1024)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder
