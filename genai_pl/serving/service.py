"""The model behind the routes: names, tokens, answers, embeddings and scores, with the limits that hold for them."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from genai_pl.data.chat import Messages
from genai_pl.devices import choose_device
from genai_pl.errors import ConfigError
from genai_pl.evaluation.preferences import judged_tokens
from genai_pl.evaluation.vectors import embed, encode_sentences, encode_whole, find_head, judge, logprobs
from genai_pl.generation import encode_prompt, limits_of
from genai_pl.loading import Loaded, load, resolve_adapter
from genai_pl.models import join
from genai_pl.models.onnx_model import is_onnx
from genai_pl.names import Head, Shape
from genai_pl.serving.answers import Answer, Recorded, is_repeatable, replay, request_key
from genai_pl.serving.cache import Cache, folder_hash, make_cache, model_hash
from genai_pl.serving.engine import Engine
from genai_pl.serving.errors import ApiError, too_busy
from genai_pl.serving.metrics import Metrics
from genai_pl.serving.passes import Passes
from genai_pl.serving.requests import Busy, Request
from genai_pl.serving.settings import Settings
from genai_pl.specs import GenerationConfig

T = TypeVar("T")
WEIGHTS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Service:
    """One loaded model; `engine` is None where it does not write."""

    def __init__(self, settings: Settings, loaded: Loaded, metrics: Metrics) -> None:
        self.settings, self.limits, self.metrics = settings, settings.limits, metrics
        self.model = loaded.model.to(choose_device(settings.device))
        self.tokenizer, self.path = loaded.tokenizer, loaded.path
        config = self.model.config
        self.name = settings.name or name_of(settings.checkpoint, loaded.path)
        self.context = min(settings.max_length or config.max_seq_len, config.max_seq_len)
        self.is_reward = config.head is Head.score
        self.has_two_stacks = config.shape is Shape.encoder_decoder
        self.sentence = find_head(settings.pooling, loaded.path, self.tokenizer, config)
        self.pooling = self.sentence.pooling
        folders = {name: resolve_adapter(path) for name, path in settings.adapters.items()}
        self.cache: Cache | None = make_cache(settings.cache, ttl=settings.cache_ttl, mib=settings.cache_mib)
        self.hashes = self._hashes(folders)
        self.engine: Engine | None = None
        if not folders:
            join(self.model)
        if config.writes:
            self.engine = Engine(
                self.model,
                self.tokenizer,
                slots=settings.slots,
                max_length=self.context,
                queue_size=self.limits.queue_size,
                adapters={name: str(path) for name, path in folders.items()},
                observer=metrics,
            )
        elif folders:
            raise ConfigError("adapter needs a model that writes; give this one its adapter as checkpoint=")
        self.started = int(time.time())
        self.reading = ThreadPoolExecutor(1, "tokenizer")  # one thread: tokenizers change state while they work
        self.passes = Passes(self.engine, queue_size=self.limits.queue_size, timeout=self.limits.timeout)

    def _hashes(self, folders: Mapping[str, Path]) -> dict[str | None, str]:
        """The name of what answers, for the base (None) and each adapter."""
        if self.cache is None:
            return {}
        base = model_hash(self.model, self.tokenizer)
        return {None: base, **{name: base + folder_hash(path) for name, path in folders.items()}}

    def start(self) -> None:
        """Begin to answer."""
        if self.engine is not None:
            self.engine.start()

    async def stop(self) -> None:
        """Finish what runs, then end."""
        if self.engine is not None:
            await asyncio.to_thread(partial(self.engine.stop, drain=True, timeout=self.settings.drain))
        self.reading.shutdown(wait=False, cancel_futures=True)
        self.passes.close()
        if self.cache is not None:
            await self.cache.close()

    @property
    def names(self) -> list[str]:
        """The base and the adapters, as clients name them."""
        return [self.name, *self.settings.adapters]

    def adapter_of(self, name: str | None, param: str = "model") -> str | None:
        """The adapter of that name, None for the base; ApiError for a name that is not served."""
        if name is None or name == self.name:
            return None
        if name not in self.settings.adapters:
            raise ApiError(404, f"{param}={name}: not served here; there is {', '.join(self.names)}", param=param)
        return name

    async def tokens(self, prompt: str | Sequence[int]) -> tuple[int, ...]:
        """What the model continues."""
        if not isinstance(prompt, str):
            return self._known(prompt)
        return tuple(await self._read(encode_prompt, prompt))

    async def chat_tokens(
        self, messages: Sequence[Mapping[str, object]], tools: Sequence[Mapping[str, object]] = ()
    ) -> tuple[int, ...]:
        """A conversation, and the tools that may be called in it, with the beginning of the answer."""
        if self.tokenizer.chat_template is None:
            raise ApiError(
                400, "the tokenizer of this model has no chat template: use /v1/completions", param="messages"
            )
        return tuple(await self._read(encode_prompt, messages, tools))

    async def prepare(self, config: GenerationConfig) -> None:
        """Compile what an answer must be like, beside everything else; ConfigError where that cannot be."""

        def compiled() -> None:
            limits = limits_of(self.engine.tokenizer, config, self.model.config.eos_token_ids)
            limits.constraint.begin(self.model.config.vocab_size)

        if self.engine is not None:
            await asyncio.get_running_loop().run_in_executor(self.reading, compiled)

    async def _read(self, encode: Callable[..., T], *arguments: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self.reading, encode, self.tokenizer, *arguments)

    def _known(self, ids: Sequence[int]) -> tuple[int, ...]:
        size = self.model.config.vocab_size
        wrong = next((i for i in ids if not 0 <= i < size), None)
        if wrong is not None:
            raise ApiError(422, f"token {wrong} is not one of the model's {size}", param="prompt")
        return tuple(ids)

    async def answer(self, request: Request) -> Answer:
        """The model's answer, from the cache where it is known already; ApiError 429 when too many wait."""
        request = self._fitting(request)
        key = None
        if self.cache is not None and is_repeatable(request):
            key = request_key(self.hashes[request.adapter], request)
            contents = await self.cache.get(key)
            known = None if contents is None else replay(contents)
            self.metrics.looked_up(found=known is not None)
            if known is not None:
                return known
        try:
            stream = self.engine.submit(request)
        except Busy as busy:
            raise too_busy(busy.retry_after) from None
        return stream if key is None else Recorded(stream, partial(self.cache.set, key))

    def _fitting(self, request: Request) -> Request:
        """The request with room for what it asks for; ApiError where there is none."""
        if self.engine is None:
            raise ApiError(400, f"{self.name} writes no text: it is for {'scores' if self.is_reward else 'embeddings'}")
        n, config = len(request.input_ids), request.config
        if n >= self.context:
            raise ApiError(
                400,
                f"the prompt has {n} tokens, the model reads at most {self.context} with what it writes: shorten it",
            )
        if config.max_new_tokens > self.context - n:
            config = replace(config, max_new_tokens=self.context - n)
        return replace(request, config=config)

    async def embed(
        self, inputs: Sequence[str | Sequence[int]], adapter: str | None = None
    ) -> tuple[torch.Tensor, int]:
        """Vectors (N, D) by the base or by an adapter, and how many tokens were read."""
        if self.is_reward:
            raise ApiError(400, f"{self.name} is a reward model: it gives scores at /score")
        self._check_one_stack("embeddings")
        texts = [text for text in inputs if isinstance(text, str)]
        encoded = iter(await self._read(encode_sentences, texts, self.sentence) if texts else [])
        rows = [next(encoded) if isinstance(item, str) else list(self._known(item)) for item in inputs]
        self._check_rows(rows)
        vectors = await self._pass(embed, self.model, rows, self.sentence, adapter=adapter)
        return vectors, sum(map(len, rows))

    async def score(
        self, prompts: Sequence[str | Messages] | None, texts: Sequence[str], adapter: str | None = None
    ) -> list[tuple[float, int]]:
        """For each text a reward, or the log-probability that the language model gives it; and of how many tokens."""
        if not (self.is_reward or self.engine is not None):
            raise ApiError(400, f"{self.name} gives no scores: it is for embeddings")
        self._check_one_stack("scores")
        if not self.is_reward:
            if any(not isinstance(prompt, str) for prompt in prompts or ()):
                raise ApiError(422, "prompt: messages are for reward models; give a text", param="prompt")
            return await self._pass(logprobs, self.model, self.tokenizer, prompts, texts, adapter=adapter)
        if prompts is None:
            rows = await self._read(encode_whole, texts)
        else:
            rows = await self._read(judged_tokens, prompts, texts)
        self._check_rows(rows)
        found = await self._pass(judge, self.model, rows)
        return list(zip(found.tolist(), map(len, rows), strict=True))

    def _check_one_stack(self, what: str) -> None:
        if self.has_two_stacks:
            raise ApiError(
                400, f"{self.name} gives no {what}: it is an encoder-decoder, which reads one text and writes another"
            )

    def _check_rows(self, rows: Sequence[Sequence[int]]) -> None:
        for n, row in enumerate(rows):
            if len(row) == 0:
                raise ApiError(400, f"text {n} has no tokens", param="input")
            if len(row) > self.context:
                raise ApiError(
                    400, f"text {n} has {len(row)} tokens, the model reads at most {self.context}: shorten it"
                )

    async def _pass(self, work: Callable[..., T], *arguments: object, adapter: str | None = None) -> T:
        if is_onnx(self.path):
            raise ApiError(400, f"{self.name} is an ONNX model, which writes only: serve the one it was made of")
        return await self.passes.run(work, *arguments, adapter=adapter)


def name_of(checkpoint: str, path: Path) -> str:
    """What a model is called: its folder, or for a run the run's."""
    path = path.resolve()
    inner = path.name in ("model", "adapter") or path.suffix == ".ckpt"
    if not inner:
        return checkpoint if "/" in checkpoint and not Path(checkpoint).exists() else path.name
    run = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    return run.name


def open_service(settings: Settings, metrics: Metrics) -> Service:
    """The model that the settings name, loaded."""
    loaded = load(settings.checkpoint, dtype=WEIGHTS[settings.dtype], onnx=True)
    if settings.backend == "onnx" and not is_onnx(loaded.path):
        raise ConfigError(f"backend=onnx: {loaded.path} is no ONNX model; write one with export.py format=onnx")
    return Service(settings, loaded, metrics)
