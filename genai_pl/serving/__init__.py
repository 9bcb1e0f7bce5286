"""Serving: one model, or another server, behind HTTP routes.

A request passes from the outside in:

    server.py, worker.py, settings.py, shutdown.py   processes, sockets (reuse_port.py), signals
    connections.py, middleware.py, http/bodies.py    limits of connections and bodies, keys, request ids, traces (tracing.py)
    app.py, http/                                    routes, JSON of requests and answers, event streams
    service.py, tokenize_threads.py, adapters.py     names, tokens, limits and adapters of one model
    answer_streams.py, response_cache.py             answers from the cache
    engine/, embeddings.py                           text generation; embeddings and scores

fair_queue.py decides whose turn it is everywhere, errors.py is the one shape of errors, metrics.py counts for Prometheus.
"""
