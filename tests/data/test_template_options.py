"""Options of chat templates: variables that callers may set, and no others."""

import pytest

from genai_pl.data import byte_tokenizer
from genai_pl.data.prompt_tokens import encode_prompt
from genai_pl.data.template_options import template_options

QUESTION = [{"role": "user", "content": "Is it raining?"}]
# as Qwen3's and gpt-oss's, in short
THINKING = (
    "{{ bos_token }}{%- for message in messages %}{{ message.content }}{%- endfor %}"
    "{%- if enable_thinking is defined and enable_thinking is false %}<think></think>{%- endif %}"
)
EFFORT = (
    "{%- macro head() %}{{ model_identity }}{% endmacro %}{{ head() }}{{ reasoning_effort | default('medium') }}"
    "{%- for message in messages %}{%- if loop.last %}{% generation %}{{ message.content }}{% endgeneration %}{% endif %}"
    "{% endfor %}{{ strftime_now('%d') if tools else '' }}{{ raise_exception('no') if add_generation_prompt is none }}"
)


@pytest.mark.parametrize(
    ("template", "options"),
    [
        (THINKING, {"enable_thinking"}),
        (EFFORT, {"reasoning_effort", "model_identity"}),
        ("{% set x = 1 %}{{ x }}{{ chat_template }}{{ tokenize }}{{ eos_token }}{{ messages }}", set()),
        ("{% if %}", set()),
        (None, set()),
    ],
)
def test_options_are_what_a_template_reads_beside_the_conversation(template: str | None, options: set[str]) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    assert template_options(tokenizer) == options


def test_variables_reach_the_template_as_in_transformers() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = THINKING
    for variables in ({"enable_thinking": False}, {"enable_thinking": True}, {}):
        expected = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=False, **variables)
        assert encode_prompt(tokenizer, QUESTION, variables=variables).tolist() == expected
    assert len(expected) < len(encode_prompt(tokenizer, QUESTION, variables={"enable_thinking": False}))
