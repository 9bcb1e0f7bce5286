"""What requests may say: pydantic's models, from which the OpenAPI description is made."""

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from genai_pl.serving.errors import ApiError
from genai_pl.serving.http.messages import Message, Text, Tool

SEEDS = 2**63
NEUTRAL: dict[str, tuple[object, ...]] = {  # options of OpenAI's that are not ours, with what they may be
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "modalities": (["text"],),
    "presence_penalty": (0,),
    "suffix": ("",),
}
IGNORED = {"metadata", "parallel_tool_calls", "prompt_cache_key", "safety_identifier", "service_tier", "store", "user"}
MAX_BIAS = 1024  # tokens


def _check_bias_size(bias: object) -> object:
    """Said before each of them is looked at."""
    if isinstance(bias, dict) and len(bias) > MAX_BIAS:
        raise ValueError(f"{len(bias)} tokens, at most {MAX_BIAS}")
    return bias


# lists fail at their first mistake: a client may make as many as there are values
Stop = Annotated[list[Annotated[Text, Field(min_length=1, max_length=256)]], Field(fail_fast=True, max_length=16)]
Seed = Annotated[int, Field(ge=-SEEDS, lt=SEEDS)]
Tokens = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(fail_fast=True, min_length=1)]
Turns = Annotated[list[Message], Field(fail_fast=True, min_length=1)]
Inputs = Annotated[list[Text | Tokens], Field(fail_fast=True, min_length=1)]
Count = Annotated[int, Field(ge=1, le=2**31)]
Bias = Annotated[
    dict[Annotated[int, Field(ge=0, lt=2**31)], Annotated[float, Field(ge=-100, le=100)]],
    Field(max_length=MAX_BIAS),
    BeforeValidator(_check_bias_size),
]


class Body(BaseModel):
    """A request; fields that it does not have are kept, to be refused by name or handed on."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    def refuse_unknown(self) -> None:
        """ApiError for an option that would have changed the answer."""
        for name, value in (self.model_extra or {}).items():
            if name not in IGNORED and value is not None and value not in NEUTRAL.get(name, ()):
                raise ApiError(422, f"{name}: no such option of this server", param=name)


class Sampling(Body):
    """How tokens are chosen; what is left out is as the server was started with."""

    temperature: Annotated[float, Field(ge=0, le=100)] | None = Field(None, description="0: the likeliest token")
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=1, le=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    logit_bias: Bias | None = Field(None, description="added to the logits of tokens, by their numbers")
    seed: Seed | None = Field(None, description="the same seed gives the same answer")
    timeout: Annotated[float, Field(gt=0, le=86400)] | None = Field(None, description="seconds; the server has a limit")


class GenerateBody(Sampling):
    """POST /generate."""

    prompt: Text
    max_new_tokens: Count | None = None
    stop: Stop = []
    adapter: Text | None = None
    stream: bool = False


class GenerateAnswer(BaseModel):
    """The prompt with its continuation (of an encoder-decoder: what it wrote), and what was written alone."""

    response: str
    text: str
    finish_reason: str
    prompt_tokens: int
    generated_tokens: int


class StreamOptions(BaseModel):
    """What a stream says beside its pieces."""

    include_usage: bool = False


class OpenAISampling(Sampling):
    """What OpenAI's two ways to ask for text share."""

    model: Text | None = Field(None, description="the model's name, or an adapter's")
    max_tokens: Count | None = None
    n: Annotated[int, Field(ge=1, le=2**31)] = 1
    stop: Stop | Annotated[Text, Field(min_length=1, max_length=256)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    response_format: dict[str, object] | None = Field(None, description="type: text, json_object or json_schema")
    guided_json: dict[str, object] | Text | None = Field(None, description="a schema, as vLLM takes it")
    guided_regex: Text | None = None
    guided_choice: Annotated[list[Text], Field(fail_fast=True)] | None = None
    structured_outputs: dict[str, object] | None = Field(None, description="one of json, json_object, regex, choice")

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])

    @property
    def with_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionBody(OpenAISampling):
    """POST /v1/completions."""

    prompt: Text | Tokens | Inputs
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        single = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return [self.prompt] if single else list(self.prompt)


class ChatBody(OpenAISampling):
    """POST /v1/chat/completions."""

    messages: Turns
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True)] | None = None
    tool_choice: Text | dict[str, object] | None = Field(None, description="none or auto")

    @model_validator(mode="after")
    def _check_logprobs(self) -> "ChatBody":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true")
        return self


class EmbeddingBody(Body):
    """POST /v1/embeddings."""

    input: Text | Tokens | Inputs
    model: Text | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Count | None = Field(None, description="the first so many numbers, again of length 1")

    @property
    def inputs(self) -> list[str | list[int]]:
        single = isinstance(self.input, str) or isinstance(self.input[0], int)
        return [self.input] if single else list(self.input)


class ScoreBody(Body):
    """POST /score."""

    text: Text | Annotated[list[Text], Field(fail_fast=True, min_length=1)]
    prompt: Text | Turns | Annotated[list[Text | Turns], Field(fail_fast=True, min_length=1)] | None = Field(
        None, description="what each text follows: a text or messages, or one of these for each"
    )
    model: Text | None = Field(None, description="the model's name, or an adapter's")

    @property
    def texts(self) -> list[str]:
        return [self.text] if isinstance(self.text, str) else list(self.text)

    @property
    def prompts(self) -> list[str | list[dict[str, object]]] | None:
        """What each text follows, None if nothing."""
        if self.prompt is None:
            return None
        prompts = [self.prompt] if self._is_one else self.prompt
        plain = [p if isinstance(p, str) else [message.plain() for message in p] for p in prompts]
        return plain * len(self.texts) if self._is_one else plain

    @property
    def _is_one(self) -> bool:
        """Whether one prompt stands before all texts."""
        return isinstance(self.prompt, str) or isinstance(self.prompt[0], Message)

    @model_validator(mode="after")
    def _check_pairs(self) -> "ScoreBody":
        if self.prompt is not None and not self._is_one and len(self.prompt) != len(self.texts):
            raise ValueError(f"{len(self.prompt)} prompts for {len(self.texts)} texts")
        return self


class Score(BaseModel):
    """Of one text."""

    score: float
    n_tokens: int


class ScoreAnswer(BaseModel):
    """kind: reward, or log_probability in nats."""

    model: str
    kind: str
    scores: list[Score]
