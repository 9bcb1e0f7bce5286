"""HTTP routes and the JSON of their requests and answers.

openai.py, native.py      routes in front of a model: /v1/...; /generate, /score, /health, /ready, /metrics, the page
response_*.py             OpenAI's /v1/responses: bodies, items, events, the memory of responses
anthropic*.py             Anthropic's /v1/messages
one_answer.py, reasoning.py   an answer as thoughts, text and calls; thoughts split off
echo.py, token_routes.py  prompts in answers, fill in the middle; /tokenize and /detokenize
proxy.py, upstream.py     the same routes in front of another server that speaks OpenAI's API
schemas.py, messages.py   pydantic models of request bodies
bodies.py                 size and time limits of bodies, before they are parsed
build_request.py          a body becomes requests to the engine
structured.py, tools.py   response_format and guided decoding; tool calls
responses.py              OpenAI's JSON of answers and stream chunks
rendering.py, streaming.py   large JSON answers; server-sent events
"""
