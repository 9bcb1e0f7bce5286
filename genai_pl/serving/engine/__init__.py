"""Batching engine: one model answers many requests at once, token by token.

A request passes these files in this order:

    request.py           Request, and the TokenStream that its answer comes out of
    engine.py            submit; the thread whose step() is schedule, prefill or decode, sample, append, finish
    request_state.py     RequestState: prompt, output and all that the next token depends on
    scheduler.py         waiting -> prefilling <-> paused -> decode batch
    adapter_selector.py  the adapter of each batch row
    model_runner.py      prefill and decode passes, and their KV caches
    sampler.py           logits to tokens, by the settings of each request
    thread_queue.py      work of other threads between two steps
    scoring.py           embeddings, rewards and log-probabilities, in slices
    scoring_queue.py     turns of these slices

Nothing here knows HTTP: `genai_pl.serving.service` sits between the engine and the routes.
"""
