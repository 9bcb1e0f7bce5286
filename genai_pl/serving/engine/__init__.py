"""The batching engine: scheduler, model runner and sampler."""
