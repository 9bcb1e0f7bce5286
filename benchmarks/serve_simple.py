"""The simplest server one would write: transformers' generate behind a lock; python benchmarks/serve_simple.py MODEL PORT."""

import json
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import anyio.to_thread
import torch
import uvicorn
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer


@asynccontextmanager
async def enough_threads(app: FastAPI) -> AsyncIterator[None]:
    """With the usual 40 threads, 40 requests that wait for the lock leave none to the one that has it: all wait for ever."""
    anyio.to_thread.current_default_thread_limiter().total_tokens = 1000
    yield


def create(name: str) -> FastAPI:
    """OpenAI's completions as a stream, one request after the other, with what `serve_load.py` reads of it."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(name).eval(), AutoTokenizer.from_pretrained(name)
    app, lock = FastAPI(lifespan=enough_threads), threading.Lock()

    def events(body: dict) -> Iterator[str]:
        with lock:
            input_ids = torch.tensor([body["prompt"]])
            streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
            found = []
            sampling = {"do_sample": True, "temperature": body["temperature"]} if body["temperature"] else {}
            options = {"max_new_tokens": body["max_tokens"], "streamer": streamer, **sampling}
            writer = threading.Thread(target=lambda: found.append(model.generate(input_ids, **options)))
            writer.start()
            for text in streamer:
                if text:
                    yield f"data: {json.dumps({'choices': [{'text': text}]})}\n\n"
            writer.join()
        usage = {"completion_tokens": found[0].shape[1] - input_ids.shape[1]}
        yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n"

    @app.post("/v1/completions")
    def completions(body: dict) -> StreamingResponse:
        return StreamingResponse(events(body), media_type="text/event-stream")

    return app


if __name__ == "__main__":
    uvicorn.run(create(sys.argv[1]), port=int(sys.argv[2]), log_level="warning")
