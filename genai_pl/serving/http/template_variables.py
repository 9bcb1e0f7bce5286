"""Variables of the chat template that a request sets: chat_template_kwargs (vLLM's) and the effort of thinking."""

from genai_pl.serving.errors import ApiError
from genai_pl.serving.http.messages import JsonObject
from genai_pl.serving.http.schemas import ChatBody
from genai_pl.serving.service import Service

MAX_CHARACTERS = 4096  # of a variable
EFFORT, THINKING = "reasoning_effort", "enable_thinking"  # of gpt-oss and others; of Qwen3 and others


def check_variables(service: Service, variables: JsonObject | None) -> dict[str, object]:
    """The variables; ApiError 422 for one that the chat template does not read, which would change nothing."""
    known = service.template_options
    for name, value in (variables or {}).items():
        if isinstance(value, dict | list) or len(str(value)) > MAX_CHARACTERS:
            kinds = f"true, false, a number or a text of at most {MAX_CHARACTERS:,} characters"
            message = f"chat_template_kwargs.{name[:80]}: give {kinds}"
            raise ApiError(422, message, param="chat_template_kwargs")
        if name not in known:
            read = f"it reads {', '.join(sorted(known))}" if known else "it reads none"
            message = f"chat_template_kwargs: the chat template of this model has no variable {name[:80]}, {read}"
            raise ApiError(422, message, param="chat_template_kwargs")
    return dict(variables or {})


def template_variables(service: Service, body: ChatBody) -> dict[str, object]:
    """Variables for the chat template of a conversation; ApiError 422 for what it has no variable for."""
    variables = check_variables(service, body.chat_template_kwargs)
    if body.reasoning_effort is None:
        return variables
    # an effort, or only whether to think at all
    if THINKING in service.template_options and (
        body.reasoning_effort == "none" or EFFORT not in service.template_options
    ):
        return {THINKING: body.reasoning_effort != "none", **variables}
    if EFFORT not in service.template_options:
        message = "reasoning_effort: the chat template of this model has no option for it"
        raise ApiError(422, message, param="reasoning_effort")
    return {EFFORT: body.reasoning_effort, **variables}


def thinking_variables(service: Service, *, thinks: bool) -> dict[str, object]:
    """chat_template_kwargs that turn thoughts on or off, none where the chat template has no option for it."""
    return {THINKING: thinks} if THINKING in service.template_options else {}
