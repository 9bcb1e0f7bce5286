"""Routes of single tokens, as vLLM names them: /tokenize and /detokenize."""

from typing import TYPE_CHECKING

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import Field, model_validator

from genai_pl.serving.errors import documented
from genai_pl.serving.http.messages import JsonObject, Text, Tool
from genai_pl.serving.http.rendering import json_answer
from genai_pl.serving.http.schemas import Body, Tokens, Turns
from genai_pl.serving.http.streaming import while_connected
from genai_pl.serving.http.template_variables import check_variables
from genai_pl.serving.service import Service

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ERRORS = documented(400, 401, 404, 408, 413, 422, 429, 500, 503, 504)


class TokenizeBody(Body):
    """Body of POST /tokenize: a text, or a conversation for the chat template."""

    prompt: Text | None = None
    messages: Turns | None = None
    tools: list[Tool] | None = None
    chat_template_kwargs: JsonObject | None = None
    model: Text | None = None
    add_special_tokens: bool = Field(True, description="of a text: begin tokens, as for a completion")
    return_token_strs: bool = Field(
        False, description="whether the answer has the tokens as they are in the vocabulary"
    )

    @model_validator(mode="after")
    def _check_one(self) -> "TokenizeBody":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give a prompt or messages")
        return self


class DetokenizeBody(Body):
    """Body of POST /detokenize: token ids."""

    tokens: Tokens
    model: Text | None = None


def token_routes(service: Service) -> APIRouter:
    """POST /tokenize and POST /detokenize for one model."""
    router = APIRouter(responses=ERRORS, tags=["tokens"])

    @router.post("/tokenize")
    async def tokenize(body: TokenizeBody, request: Request) -> Response:
        """Token ids of a text or a conversation, as the model reads them."""
        body.refuse_unknown()
        service.adapter_of(body.model)
        if body.messages is not None:
            tools = [tool.model_dump(exclude_unset=True) for tool in body.tools or ()]
            variables = check_variables(service, body.chat_template_kwargs)
            work = service.chat_tokens([message.plain() for message in body.messages], tools, variables)
        elif body.add_special_tokens:
            work = service.tokens(body.prompt)
        else:
            work = service.plain_tokens(body.prompt)
        tokens = await while_connected(request.receive, work)

        def whole() -> dict[str, object]:
            strings = service.tokenizer.convert_ids_to_tokens(list(tokens)) if body.return_token_strs else None
            found = {"count": len(tokens), "max_model_len": service.context, "tokens": list(tokens)}
            return {**found, "token_strs": strings}

        return await json_answer(whole)

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeBody, request: Request) -> Response:
        """The text of token ids, special tokens included."""
        body.refuse_unknown()
        service.adapter_of(body.model)
        tokens = service.check_token_ids(body.tokens, "tokens")
        decoded = service.tokenize_threads.encode(_decode, tokens, size=4 * len(tokens))
        text = await while_connected(request.receive, decoded)
        return await json_answer(lambda: {"prompt": text})

    return router


def _decode(tokenizer: "PreTrainedTokenizerBase", tokens: tuple[int, ...]) -> str:
    return tokenizer.decode(list(tokens), skip_special_tokens=False)
