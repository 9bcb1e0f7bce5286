"""The model behind the routes: names, tokens and answers, with the limits that hold for them."""

import asyncio
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from genai_pl.config.enums import Head, Shape
from genai_pl.config.generation import GenerationConfig
from genai_pl.devices import choose_device
from genai_pl.errors import ConfigError
from genai_pl.evaluation.embeddings import find_sentence_head
from genai_pl.generation import build_output_constraints, encode_prompt
from genai_pl.loading import Loaded, load, refuse_twice, resolve_adapter
from genai_pl.models import prepare_for_decoding
from genai_pl.models.onnx.model import is_onnx
from genai_pl.serving.answer_streams import Answer, RecordingStream, decode_answer, is_repeatable, request_key
from genai_pl.serving.embeddings import TextScorer, size_of
from genai_pl.serving.engine.engine import Engine
from genai_pl.serving.engine.request import QueueFull, Request, TokenStream
from genai_pl.serving.engine.scoring_queue import ScoringQueue
from genai_pl.serving.errors import ApiError, too_busy
from genai_pl.serving.fair_queue import CLIENT
from genai_pl.serving.metrics import Metrics
from genai_pl.serving.response_cache import Cache, folder_hash, make_cache, model_hash
from genai_pl.serving.settings import Settings
from genai_pl.serving.tokenize_threads import TokenizeThreads

CPU_CHUNK, GPU_CHUNK = 128, 512  # tokens of prompts that are read before others have their turn
LONGEST = 32  # characters that a token has at least room for, as a rare word may that is one
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
        self.sentence = find_sentence_head(settings.pooling, loaded.path, self.tokenizer, config)
        self.pooling = self.sentence.pooling
        folders = {name: resolve_adapter(path) for name, path in settings.adapters.items()}
        self.cache: Cache | None = make_cache(settings.cache, ttl=settings.cache_ttl, mib=settings.cache_mib)
        self.hashes = self._model_hashes(folders)
        self.engine: Engine | None = None
        if not folders:
            prepare_for_decoding(self.model)
        if config.writes:
            self.engine = Engine(
                self.model,
                self.tokenizer,
                slots=settings.slots,
                max_length=self.context,
                queue_size=self.limits.queue_size,
                prefill_chunk=CPU_CHUNK if choose_device(settings.device).type == "cpu" else GPU_CHUNK,
                adapters={name: str(path) for name, path in folders.items()},
                observer=metrics,
            )
        elif folders:
            raise ConfigError("adapter needs a model that writes; give this one its adapter as checkpoint=")
        self.started = int(time.time())
        waiting = {"queue_size": self.limits.queue_size, "timeout": self.limits.timeout}
        self.tokenize_threads = TokenizeThreads(self.tokenizer, **waiting)
        self.scoring_queue = ScoringQueue(self.engine, **waiting)
        self.scorer = TextScorer(self)
        self.longest = max(LONGEST, *map(len, self.tokenizer.get_vocab()))  # characters of one token

    def _model_hashes(self, folders: Mapping[str, Path]) -> dict[str | None, str]:
        """The name of what answers, for the base (None) and each adapter."""
        if self.cache is None:
            return {}
        base = model_hash(self.model, self.tokenizer)
        return {None: base, **{name: base + folder_hash(path) for name, path in folders.items()}}

    def start(self) -> None:
        """Begin to answer."""
        if self.engine is not None:
            self.engine.start()

    def give_up(self) -> None:
        """End what runs, after the step or slice that it is in: the time to finish is over."""
        self.scoring_queue.stop()
        if self.engine is not None:
            self.engine.cancel_all()

    async def stop(self) -> None:
        """End; whatever could be finished is."""
        self.scoring_queue.stop()
        if self.engine is not None:
            await asyncio.to_thread(partial(self.engine.stop, drain=False))
        self.tokenize_threads.close()
        self.scoring_queue.close()
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
            return self.check_token_ids(prompt)
        self._check_size(len(prompt))
        return tuple(await self.tokenize_threads.encode(encode_prompt, prompt, size=len(prompt)))

    async def chat_tokens(
        self, messages: Sequence[Mapping[str, object]], tools: Sequence[Mapping[str, object]] = ()
    ) -> tuple[int, ...]:
        """A conversation, and the tools that may be called in it, with the beginning of the answer."""
        if self.tokenizer.chat_template is None:
            raise ApiError(
                400, "the tokenizer of this model has no chat template: use /v1/completions", param="messages"
            )
        size = size_of(messages)
        self._check_size(size)
        return tuple(await self.tokenize_threads.encode_chat(messages, tools, size=size + len(str(tools))))

    async def prepare(self, config: GenerationConfig) -> None:
        """Compile what an answer must be like, beside everything else; ConfigError where that cannot be."""

        def compiled() -> None:
            constraints = build_output_constraints(self.engine.tokenizer, config, self.model.config.eos_token_ids)
            constraints.constraint.begin(self.model.config.vocab_size)

        if self.engine is not None:
            await self.tokenize_threads.grammars.run(compiled)

    def _check_size(self, n: int) -> None:
        """ApiError for so many characters that it needs no tokenizer to see that they are too many."""
        if n > self.context * self.longest:
            raise ApiError(400, f"the prompt has {n:,} characters, more than {self.context:,} tokens have: shorten it")

    def check_token_ids(self, ids: Sequence[int]) -> tuple[int, ...]:
        size = self.model.config.vocab_size
        if ids and not 0 <= min(ids) <= max(ids) < size:
            wrong = min(ids) if min(ids) < 0 else max(ids)
            raise ApiError(422, f"token {wrong} is not one of the model's {size}", param="prompt")
        return tuple(ids)

    async def answer(self, request: Request) -> Answer:
        """The model's answer, from the cache where it is known already; ApiError 429 when too many wait."""
        request = self._clamp_to_context(request)
        key = None
        if self.cache is not None and is_repeatable(request):
            key = request_key(self.hashes[request.adapter], request)
            contents = await self.cache.get(key)
            cached = None if contents is None else await asyncio.to_thread(decode_answer, contents)
            self.metrics.cache_lookup(hit=cached is not None)
            if cached is not None:
                return cached
        request = replace(request, client=CLIENT.get())
        try:
            if request.config.json_schema is None and request.config.regex is None:
                stream = self.engine.submit(request)
            else:  # its grammar may have to be compiled once more
                stream = await self._submit_off_loop(request)
        except QueueFull as busy:
            raise too_busy(busy.retry_after) from None
        return stream if key is None else RecordingStream(stream, partial(self.cache.set, key))

    async def _submit_off_loop(self, request: Request) -> TokenStream:
        """The answer to a request that is submitted beside the event loop; nobody waits for it once this is cancelled."""
        streams: list[TokenStream] = []
        is_over = threading.Event()

        def submit() -> TokenStream:
            streams.append(self.engine.submit(request))
            if is_over.is_set():
                streams[0].cancel()
            return streams[0]

        try:
            return await self.tokenize_threads.grammars.run(submit)
        except BaseException:
            is_over.set()
            for stream in streams:
                stream.cancel()
            raise

    def _clamp_to_context(self, request: Request) -> Request:
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
    for name in settings.adapters.values():
        refuse_twice(loaded.path, resolve_adapter(name), message=f"adapter={name}: checkpoint={settings.checkpoint}")
    return Service(settings, loaded, metrics)
