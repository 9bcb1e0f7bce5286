"""Service: one loaded model behind the routes, with its names, tokenizer threads, cache, engine and limits."""

import asyncio
import threading
import time
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

import torch

from genai_pl.config.enums import Head, Shape
from genai_pl.config.generation import GenerationConfig
from genai_pl.config.labels import read_labels
from genai_pl.data.template_options import template_options
from genai_pl.data.tool_calls import CallReader
from genai_pl.devices import CODES, check_codes, choose_device
from genai_pl.errors import ConfigError
from genai_pl.evaluation.embeddings import find_sentence_head
from genai_pl.evaluation.labels import is_reward_model
from genai_pl.generation import build_output_constraints, encode_gap, encode_prompt
from genai_pl.generation.fill_in_the_middle import FimFormat
from genai_pl.loading import Loaded, load, refuse_twice, resolve_adapter
from genai_pl.models import move_to, prepare_for_decoding
from genai_pl.models.onnx.model import is_onnx
from genai_pl.serving.adapters import ServedAdapters
from genai_pl.serving.answer_streams import Answer, RecordingStream, decode_answer, is_repeatable, request_key
from genai_pl.serving.embeddings import TextScorer, size_of
from genai_pl.serving.engine.engine import Engine
from genai_pl.serving.engine.request import QueueFull, Request, TokenStream
from genai_pl.serving.engine.scoring_queue import ScoringQueue
from genai_pl.serving.errors import ApiError, too_busy
from genai_pl.serving.fair_queue import CLIENT
from genai_pl.serving.http.reasoning import Reasoning
from genai_pl.serving.labels import TextLabeller
from genai_pl.serving.metrics import Metrics
from genai_pl.serving.rate_limits import RateLimits
from genai_pl.serving.response_cache import Cache, make_cache, model_hash
from genai_pl.serving.settings import Settings
from genai_pl.serving.settings_checks import check_answerable, check_names
from genai_pl.serving.tokenize_threads import TokenizeThreads, encode_plain
from genai_pl.serving.tracing import note_answer

CPU_CHUNK, GPU_CHUNK = 128, 512  # prompt tokens between two decode steps
MIN_TOKEN_CHARACTERS = 32  # characters of one token, at least, in the check of prompts before tokenizing
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # of weights as they are loaded
DTYPES |= dict.fromkeys(CODES, torch.float32)


class Service:
    """One loaded model and all that answers requests with it.

    settings: names, limits, cache, slots and default sampling settings
    loaded: model, tokenizer and folder
    metrics: observer of the engine, and counter of cache lookups

    Attributes that routes use: `name` and `names` (base and adapters), `context` (tokens of prompt and answer), `engine` (None
    for encoders and models of scores, which write no text), `scorer` (embeddings and scores), `labeller` (classes and
    relevance by `labels`, which are None for other models), `is_reward`, `has_two_stacks` (encoder-decoder), `tokenizer` (for
    single tokens only: texts go to tokenize_threads).
    """

    def __init__(self, settings: Settings, loaded: Loaded, metrics: Metrics) -> None:
        self.settings, self.limits, self.metrics = settings, settings.limits, metrics
        device = choose_device(settings.device)
        if settings.dtype in CODES:
            check_codes(settings.dtype, device)
        self.model = move_to(loaded.model, device, loaded.model.embed.weight.dtype)
        self.tokenizer, self.path = loaded.tokenizer, loaded.path
        config = self.model.config
        self.name = settings.name or name_of(settings.checkpoint, loaded.path)
        check_names(self.name, settings)
        self.context = min(settings.max_length or config.max_seq_len, config.max_seq_len)
        self.is_reward = is_reward_model(self.model)
        has_labels = config.head is Head.score and not self.is_reward
        self.labels = read_labels(config.extra, config.n_labels) if has_labels else None
        self.has_two_stacks = config.shape is Shape.encoder_decoder
        # embeddings, cache
        self.sentence = find_sentence_head(settings.pooling, loaded.path, self.tokenizer, config)
        self.pooling = self.sentence.pooling
        folders = {name: resolve_adapter(path) for name, path in settings.adapters.items()}
        self.cache: Cache | None = make_cache(settings.cache, ttl=settings.cache_ttl, mib=settings.cache_mib)
        self.base_hash = "" if self.cache is None else self._model_hash()
        # engine; without adapters the model may fuse weights that an adapter would have to reach
        self.engine: Engine | None = None
        reloads = settings.adapters_root is not None
        if not folders and not reloads:
            packed = CODES.get(settings.dtype)
            prepare_for_decoding(self.model, packed, rows=settings.slots)
        if config.writes:
            check_answerable(settings, self.model, self.tokenizer)
            self.engine = Engine(
                self.model,
                self.tokenizer,
                slots=settings.slots,
                max_length=self.context,
                queue_size=self.limits.queue_size,
                prefill_chunk=settings.prefill_chunk or (CPU_CHUNK if device.type == "cpu" else GPU_CHUNK),
                prefix_cache_mib=settings.prefix_cache_mib,
                adapters={name: str(path) for name, path in folders.items()},
                reloads_adapters=reloads,
                observer=metrics,
            )
        elif folders or reloads:
            option = "adapter" if folders else "adapters_root"
            raise ConfigError(f"{option} needs a model that writes; give this one its adapter as checkpoint=")
        places = {"checkpoint": loaded.path, "base": self.name, "root": settings.adapters_root}
        self.adapters = ServedAdapters(self.engine, folders, **places)
        # queues beside the engine
        self.started = int(time.time())
        waiting = {"queue_size": self.limits.queue_size, "timeout": self.limits.timeout}
        self.tokenize_threads = TokenizeThreads(self.tokenizer, **waiting)
        self.scoring_queue = ScoringQueue(self.engine, **waiting)
        self.rates = RateLimits(settings.requests_per_minute, settings.tokens_per_minute)
        self.scorer, self.labeller = TextScorer(self), TextLabeller(self)
        self.longest = max(MIN_TOKEN_CHARACTERS, *map(len, self.tokenizer.get_vocab()))  # characters of one token

    def _model_hash(self) -> str:
        """Hash of the base: the model's part of cache keys, which an adapter's follows."""
        base = model_hash(self.model, self.tokenizer)
        return base + (self.settings.dtype if self.settings.dtype in CODES else "")  # not quantized yet

    def start(self) -> None:
        """Start the engine's thread."""
        if self.engine is not None:
            self.engine.start()

    def give_up(self) -> None:
        """End what runs after its current step or slice, because the time to drain is over; callable from any thread."""
        self.scoring_queue.stop()
        if self.engine is not None:
            self.engine.cancel_all()

    async def stop(self) -> None:
        """Stop engine, threads and cache; uvicorn calls it once all requests have ended."""
        self.scoring_queue.stop()
        if self.engine is not None:
            await asyncio.to_thread(partial(self.engine.stop, drain=False))
        self.tokenize_threads.close()
        self.scoring_queue.close()
        if self.cache is not None:
            await self.cache.close()

    @property
    def purpose(self) -> str:
        """What a model that writes no text is for."""
        return "scores" if self.is_reward else "embeddings" if self.labels is None else "labels"

    @property
    def names(self) -> list[str]:
        """Names that clients give as `model`: the base, then the adapters."""
        return [self.name, *self.adapters.by_name]

    def adapter_of(self, name: str | None, param: str = "model") -> str | None:
        """The engine's name of a client's adapter, None for the base; ApiError 404 for a name that is not served."""
        if name is None or name == self.name:
            return None
        adapter = self.adapters.find(name)
        if adapter is None:
            raise ApiError(404, f"{param}={name}: not served here; there is {', '.join(self.names)}", param=param)
        return adapter.key

    async def tokens(self, prompt: str | Sequence[int]) -> tuple[int, ...]:
        """Token ids of a prompt: a text, tokenized as in training, or ids that are only checked."""
        if not isinstance(prompt, str):
            return self.check_token_ids(prompt)
        self._check_size(len(prompt))
        return tuple(await self.tokenize_threads.encode(encode_prompt, prompt, size=len(prompt)))

    async def plain_tokens(self, text: str) -> tuple[int, ...]:
        """Token ids of a text without begin and end tokens."""
        self._check_size(len(text))
        return tuple(await self.tokenize_threads.encode(encode_plain, text, size=len(text)))

    async def gap_tokens(self, form: FimFormat, prefix: str | Sequence[int], suffix: str) -> tuple[int, ...]:
        """Token ids of a prompt to fill in what is between a prefix, as text or ids, and a suffix."""
        if not isinstance(prefix, str):
            self.check_token_ids(prefix)
        size = len(prefix) + len(suffix)
        self._check_size(size)
        return tuple(await self.tokenize_threads.encode(encode_gap, form, prefix, suffix, size=size))

    @cached_property
    def call_reader(self) -> CallReader:
        """Finds tool calls in answers; made once, with a tokenizer of its own, which no other thread uses."""
        return CallReader(deepcopy(self.tokenizer))

    @cached_property
    def reasoning(self) -> Reasoning:
        """How the model writes its thoughts; it decodes the ends of prompts only."""
        return Reasoning(self.tokenizer)

    @cached_property
    def template_options(self) -> frozenset[str]:
        """Variables of the chat template that requests may set."""
        return template_options(self.tokenizer)

    async def chat_tokens(
        self,
        messages: Sequence[Mapping[str, object]],
        tools: Sequence[Mapping[str, object]] = (),
        variables: Mapping[str, object] | None = None,
    ) -> tuple[int, ...]:
        """Token ids of a conversation by the tokenizer's chat template, with the beginning of the assistant's answer.

        tools: functions that the template describes to the model
        variables: of the template, among `template_options`
        Raises ApiError 400 if the tokenizer has no template or the conversation cannot fit.
        """
        if self.tokenizer.chat_template is None:
            raise ApiError(
                400, "the tokenizer of this model has no chat template: use /v1/completions", param="messages"
            )
        size = size_of(messages)
        self._check_size(size)
        return tuple(
            await self.tokenize_threads.encode_chat(messages, tools, variables or {}, size=size + len(str(tools)))
        )

    async def prepare(self, config: GenerationConfig) -> None:
        """Compile the grammar of constrained decoding in its own thread; ConfigError if it cannot be compiled.

        Compiled grammars are cached, so `submit` usually finds this one and need not compile it again.
        """

        def compiled() -> None:
            constraints = build_output_constraints(self.engine.tokenizer, config, self.model.config.eos_token_ids)
            constraints.constraint.begin(self.model.config.vocab_size)

        if self.engine is not None:
            await self.tokenize_threads.grammars.run(compiled)

    def _check_size(self, n: int) -> None:
        """ApiError 400 for so many characters that they cannot fit, whatever their tokens are."""
        if n > self.context * self.longest:
            raise ApiError(400, f"the prompt has {n:,} characters, more than {self.context:,} tokens have: shorten it")

    def check_token_ids(self, ids: Sequence[int], param: str = "prompt") -> tuple[int, ...]:
        """The same ids; ApiError 422, naming the field, if one is outside the vocabulary."""
        size = self.model.config.vocab_size
        if ids and not 0 <= min(ids) <= max(ids) < size:
            wrong = min(ids) if min(ids) < 0 else max(ids)
            raise ApiError(422, f"token {wrong} is not one of the model's {size}", param=param)
        return tuple(ids)

    async def answer(self, request: Request) -> Answer:
        """The stream of the answer, from the cache if it has it, else from the engine.

        Raises ApiError 400 for a prompt that does not fit, 429 if too many requests wait.
        """
        request = self._clamp_to_context(request)
        answer = await self._answer(request)
        self.rates.spend(len(request.input_ids))
        return self.rates.metered(answer)

    async def _answer(self, request: Request) -> Answer:
        """The same for a request that fits; its tokens are not counted."""
        # cache
        key = None
        if self.cache is not None and is_repeatable(request):
            key = request_key(self.base_hash + self.adapters.digests.get(request.adapter, ""), request)
            contents = await self.cache.get(key)
            cached = None if contents is None else await asyncio.to_thread(decode_answer, contents)
            self.metrics.cache_lookup(hit=cached is not None)
            if cached is not None:
                return cached
        # engine
        request = replace(request, client=CLIENT.get())
        try:
            if request.config.json_schema is None and request.config.regex is None:
                stream = self.engine.submit(request)
            else:  # `submit` may compile its grammar, which must not hold the event loop
                stream = await self._submit_off_loop(request)
        except QueueFull as busy:
            raise too_busy(busy.retry_after) from None
        note_answer(stream, len(request.input_ids))
        return stream if key is None else RecordingStream(stream, partial(self.cache.set, key))

    async def _submit_off_loop(self, request: Request) -> TokenStream:
        """Submit in the grammar thread; if the caller is cancelled meanwhile, the stream is cancelled when it exists."""
        streams: list[TokenStream] = []
        is_over = threading.Event()

        def submit() -> TokenStream:
            streams.append(self.engine.submit(request))
            if is_over.is_set():
                streams[0].cancel()
            return streams[0]

        # a cancelled caller leaves the thread at work: `submit` cancels the stream itself when it has one
        try:
            return await self.tokenize_threads.grammars.run(submit)
        except BaseException:
            is_over.set()
            for stream in streams:
                stream.cancel()
            raise

    def _clamp_to_context(self, request: Request) -> Request:
        """The request with max_new_tokens cut to what the context leaves; ApiError 400 if it leaves nothing."""
        if self.engine is None:
            raise ApiError(400, f"{self.name} writes no text: it is for {self.purpose}")
        n, config = len(request.input_ids), request.config
        if n >= self.context:
            raise ApiError(
                400,
                f"the prompt has {n} tokens, the model reads at most {self.context} with what it writes: shorten it",
            )
        if config.max_new_tokens > self.context - n:
            least = min(config.min_new_tokens, self.context - n)
            config = replace(config, max_new_tokens=self.context - n, min_new_tokens=least)
        return replace(request, config=config)


def name_of(checkpoint: str, path: Path) -> str:
    """Default name of a model: a hub id as it is, else the name of its folder, or of the run that the folder is part of.

    >>> name_of("outputs/polite", Path("outputs/polite/model"))
    'polite'
    """
    path = path.resolve()
    inner = path.name in ("model", "adapter") or path.suffix == ".ckpt"
    if not inner:
        return checkpoint if "/" in checkpoint and not Path(checkpoint).exists() else path.name
    run = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    return run.name


def open_service(settings: Settings, metrics: Metrics) -> Service:
    """Load the model of the settings and return its service; ConfigError if backend or adapters do not fit it."""
    loaded = load(settings.checkpoint, dtype=DTYPES[settings.dtype], onnx=True)
    if settings.backend == "onnx" and not is_onnx(loaded.path):
        raise ConfigError(f"backend=onnx: {loaded.path} is no ONNX model; write one with export.py format=onnx")
    for name in settings.adapters.values():
        refuse_twice(loaded.path, resolve_adapter(name), message=f"adapter={name}: checkpoint={settings.checkpoint}")
    return Service(settings, loaded, metrics)
