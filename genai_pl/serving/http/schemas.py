"""Request bodies of all routes as pydantic models, from which FastAPI makes the OpenAPI description.

Every field has bounds, and lists stop at their first mistake: validating a body must not cost more than the work it asks for.
"""

from difflib import get_close_matches
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from genai_pl.serving.errors import ApiError
from genai_pl.serving.http.messages import JsonObject, Message, Text, Tool

TOP_K_MAX = 2**31
SEEDS = 2**63  # seeds are signed integers of 64 bits, as torch.Generator takes them
NEUTRAL: dict[str, tuple[object, ...]] = {  # fields without effect here: the values that change nothing
    "best_of": (1,),
    "modalities": (["text"],),
    "verbosity": ("medium",),
    "speed": ("standard",),
}
# fields that never change an answer: notes, whose request it is, and what concerns a cache that is always on here
IGNORED = {"metadata", "parallel_tool_calls", "safety_identifier", "service_tier", "store", "user"}
IGNORED |= {"cache_control", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "user_profile_id"}
# deprecated fields, and those of other servers, with what to write here
INSTEAD = {
    "function_call": "tool_choice",
    "functions": "tools",
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "stop_sequences": "stop",
    "output_format": "output_config.format",
}
# fields of Sampling that override the server's settings
SAMPLING_FIELDS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
)
MAX_BIAS = 1024  # tokens in logit_bias


def _check_bias_size(bias: object) -> object:
    """The bias; ValueError for too many tokens, before pydantic validates each."""
    if isinstance(bias, dict) and len(bias) > MAX_BIAS:
        raise ValueError(f"{len(bias)} tokens, at most {MAX_BIAS}")
    return bias


# fail_fast: a list of a million wrong items is one error, not a million
Stop = Annotated[list[Annotated[Text, Field(min_length=1, max_length=256)]], Field(fail_fast=True, max_length=16)]
Seed = Annotated[int, Field(ge=-SEEDS, lt=SEEDS)]
Tokens = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(fail_fast=True, min_length=1)]
Turns = Annotated[list[Message], Field(fail_fast=True, min_length=1)]
Inputs = Annotated[list[Text | Tokens], Field(fail_fast=True, min_length=1)]
Count = Annotated[int, Field(ge=1, le=2**31)]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]  # of thinking
Bias = Annotated[
    dict[Annotated[int, Field(ge=0, lt=2**31)], Annotated[float, Field(ge=-100, le=100)]],
    Field(max_length=MAX_BIAS),
    BeforeValidator(_check_bias_size),
]


def _all_tokens(value: object) -> object:
    """vLLM's values of top_k for every token, 0 and -1, as a number above any vocabulary; others as they are."""
    return TOP_K_MAX if type(value) is int and value in (0, -1) else value


class Body(BaseModel):
    """Base of bodies; unknown fields are kept, to be refused by name here or forwarded to an upstream server."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    def refuse_unknown(self) -> None:
        """Raise ApiError 422 for an unknown field that would have changed the answer; neutral values are accepted."""
        for name, value in (self.model_extra or {}).items():
            if name not in IGNORED and value is not None and value not in NEUTRAL.get(name, ()):
                raise ApiError(422, f"{name[:80]}: no such option of this server{self._hint(name)}", param=name)

    def _hint(self, name: str) -> str:
        """The field that an unknown one may stand for, as the end of a message."""
        known = INSTEAD.get(name, "").partition(".")[0]
        if known in type(self).model_fields:
            return f", use {INSTEAD[name]}"
        near = get_close_matches(name[:80], type(self).model_fields, n=1, cutoff=0.85)
        return f", did you mean {near[0]}?" if near else ""


class Sampling(Body):
    """Sampling fields of all text routes; a field that is left out has the server's value (`generation.*`)."""

    temperature: Annotated[float, Field(ge=0, le=100)] | None = Field(None, description="0: the likeliest token")
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=1, le=TOP_K_MAX)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Bias | None = Field(None, description="added to the logits of tokens, by their numbers")
    seed: Seed | None = Field(None, description="the same seed gives the same answer")
    timeout: Annotated[float, Field(gt=0, le=86400)] | None = Field(None, description="seconds; the server has a limit")


class GenerateBody(Sampling):
    """Body of POST /generate: one prompt, continued as it is; `stop` are strings that end the text."""

    prompt: Text
    max_new_tokens: Count | None = None
    stop: Stop = []
    adapter: Text | None = None
    stream: bool = False


class GenerateAnswer(BaseModel):
    """Answer of POST /generate.

    response: prompt and continuation; of an encoder-decoder the generated text
    text: the generated text alone
    """

    response: str
    text: str
    finish_reason: str
    prompt_tokens: int
    generated_tokens: int


class StreamOptions(BaseModel):
    """OpenAI's stream_options; include_usage adds a last event with token counts."""

    include_usage: bool = False


class OpenAISampling(Sampling):
    """Fields that /v1/completions and /v1/chat/completions share; vLLM's are min_tokens, ignore_eos, guided_* and others."""

    model: Text | None = Field(None, description="the model's name, or an adapter's")
    max_tokens: Count | None = None
    top_k: Annotated[Annotated[int, Field(ge=1, le=TOP_K_MAX)] | None, BeforeValidator(_all_tokens)] = Field(
        None, description="0 or -1: of all tokens"
    )
    n: Annotated[int, Field(ge=1, le=2**31)] = 1
    stop: Stop | Annotated[Text, Field(min_length=1, max_length=256)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=2**31)] | None = Field(None, description="no end token before so many")
    ignore_eos: bool = Field(False, description="whether no end token is drawn at all")
    stream: bool = False
    stream_options: StreamOptions | None = None
    response_format: dict[str, object] | None = Field(None, description="type: text, json_object or json_schema")
    guided_json: dict[str, object] | Text | None = Field(None, description="a schema, as vLLM takes it")
    guided_regex: Text | None = None
    guided_choice: Annotated[list[Text], Field(fail_fast=True)] | None = None
    structured_outputs: dict[str, object] | None = Field(None, description="one of json, json_object, regex, choice")

    @property
    def stops(self) -> list[str]:
        """Stop strings as a list."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])

    @property
    def with_usage(self) -> bool:
        """True if a stream ends with an event of token counts."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionBody(OpenAISampling):
    """Body of POST /v1/completions: texts or token ids; `logprobs` is the number of likeliest tokens to report."""

    prompt: Text | Tokens | Inputs
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    max_tokens: Annotated[int, Field(ge=0, le=2**31)] | None = Field(None, description="0 with echo: the prompt alone")
    echo: bool | None = Field(None, description="whether the text begins with the prompt, and logprobs have its tokens")
    return_tokens_as_token_ids: bool = Field(False, description="whether logprobs name tokens token_id:N, as vLLM does")
    suffix: Text | None = Field(None, description="the text after the answer, for models that fill in the middle")

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts as a list; a list of numbers is one prompt of token ids."""
        single = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return [self.prompt] if single else list(self.prompt)

    @model_validator(mode="after")
    def _check_echo(self) -> "CompletionBody":
        if self.max_tokens == 0 and (not self.echo or self.stream):
            raise ValueError("max_tokens=0 goes with echo=true, and without stream")
        if self.echo and self.suffix:
            raise ValueError("echo and suffix do not go together")
        return self


class ChatBody(OpenAISampling):
    """Body of POST /v1/chat/completions."""

    messages: Turns
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True)] | None = None
    tool_choice: Text | dict[str, object] | None = Field(
        None, description="none, auto, required, or a function by name"
    )
    reasoning_effort: Effort | None = Field(None, description="of thinking, for chat templates with an option for it")
    chat_template_kwargs: JsonObject | None = Field(
        None, description="variables of the chat template, as vLLM has them"
    )

    @model_validator(mode="after")
    def _check_logprobs(self) -> "ChatBody":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true")
        return self


class EmbeddingBody(Body):
    """Body of POST /v1/embeddings: texts or token ids."""

    input: Text | Tokens | Inputs
    model: Text | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Count | None = Field(None, description="this many of the first numbers, again of length 1")

    @property
    def inputs(self) -> list[str | list[int]]:
        """The inputs as a list; a list of numbers is one input of token ids."""
        single = isinstance(self.input, str) or isinstance(self.input[0], int)
        return [self.input] if single else list(self.input)


class ScoreBody(Body):
    """Body of POST /score: texts, and what each follows."""

    text: Text | Annotated[list[Text], Field(fail_fast=True, min_length=1)]
    prompt: Text | Turns | Annotated[list[Text | Turns], Field(fail_fast=True, min_length=1)] | None = Field(
        None, description="what each text follows: a text or messages, or one of these for each"
    )
    model: Text | None = Field(None, description="the model's name, or an adapter's")

    @property
    def texts(self) -> list[str]:
        """The texts as a list."""
        return [self.text] if isinstance(self.text, str) else list(self.text)

    @property
    def prompts(self) -> list[str | list[dict[str, object]]] | None:
        """A prompt for each text: a text, or a conversation as plain dicts; None if texts follow nothing."""
        if self.prompt is None:
            return None
        prompts = [self.prompt] if self._is_one else self.prompt
        plain = [p if isinstance(p, str) else [message.plain() for message in p] for p in prompts]
        return plain * len(self.texts) if self._is_one else plain

    @property
    def _is_one(self) -> bool:
        """True if there is one prompt for all texts: a text, or one conversation."""
        return isinstance(self.prompt, str) or isinstance(self.prompt[0], Message)

    @model_validator(mode="after")
    def _check_pairs(self) -> "ScoreBody":
        if self.prompt is not None and not self._is_one and len(self.prompt) != len(self.texts):
            raise ValueError(f"{len(self.prompt)} prompts for {len(self.texts)} texts")
        return self


class Score(BaseModel):
    """Score of one text, and how many of its tokens were scored."""

    score: float
    n_tokens: int


class ScoreAnswer(BaseModel):
    """Answer of POST /score; `kind` is "reward" or "log_probability" (in nats)."""

    model: str
    kind: str
    scores: list[Score]
