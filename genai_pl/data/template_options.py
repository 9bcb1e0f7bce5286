"""Options of a chat template: variables that it reads beside the conversation, such as `enable_thinking` of Qwen3's."""

import inspect
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# tags of transformers that jinja2 alone cannot parse: they mark the assistant's text and read nothing
GENERATION = re.compile(r"{%-?\s*(?:end)?generation\s*-?%}")
GIVEN = {"messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now"}


def template_options(tokenizer: "PreTrainedTokenizerBase") -> frozenset[str]:
    """Names of the variables that callers may set for the tokenizer's chat template; none without a template.

    Left out are those that every rendering sets: the conversation, tools, special tokens, and arguments of
    apply_chat_template, one of which would replace the template itself.
    """
    from jinja2 import Environment, TemplateSyntaxError, meta

    if not isinstance(tokenizer.chat_template, str):
        return frozenset()
    environment = Environment(extensions=["jinja2.ext.do", "jinja2.ext.loopcontrols"], autoescape=False)
    try:
        read = meta.find_undeclared_variables(environment.parse(GENERATION.sub("", tokenizer.chat_template)))
    except TemplateSyntaxError:
        return frozenset()
    taken = {*inspect.signature(tokenizer.apply_chat_template).parameters, *tokenizer.special_tokens_map}
    return frozenset(name for name in read - taken - GIVEN if not name.endswith("_token"))
