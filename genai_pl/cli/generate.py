"""The generate command: a resolved configuration in, text or lines of JSON on stdout out.

What the command does depends on the model and three flags: a decoder or encoder-decoder continues prompts,
`chat=true` holds a conversation, an encoder fills in masks, `embed=true` prints vectors and `score=true`
likelihoods or rewards. Completions go to stdout; hints and statistics to stderr.
"""

import json
import math
import sys
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from genai_pl.cli.chat import Chat, answer_all, run_terminal
from genai_pl.config.enums import Head, Shape
from genai_pl.config.generation import GenerationConfig
from genai_pl.devices import choose_device, weights_of
from genai_pl.environments.tools import Tools
from genai_pl.errors import ConfigError, DataError
from genai_pl.generation import Acceptance, Completion, complete, encode_prompt
from genai_pl.generation.fill_mask import fill
from genai_pl.loading import Loaded, load, load_draft
from genai_pl.models import Encoder, move_to, prepare_for_decoding
from genai_pl.models.virtual_tokens import context_of
from genai_pl.peft import RowWeights, adapters_of
from genai_pl.training.hydra_job import job_overrides
from genai_pl.training.named_objects import named_object
from genai_pl.training.unused_options import ENCODER_RULE, GENERATE_RULES, WRITER_RULE, refuse_unused


def generate(config: DictConfig) -> int:
    """Continue, chat, fill in masks, embed or score, as options and model decide; the exit status."""
    check_options(config)
    prompts = [] if config.chat else read_prompts(config)
    # weights in the precision's dtype; products under autocast where the two differ
    device = choose_device(config.device)
    weights, products = weights_of(config.precision.lightning, config.dtype, device)
    rows = max(1, len(prompts) * config.num_samples)
    options = {"onnx": not (config.embed or config.score), "rows": rows}
    loaded = load(config.checkpoint, dtype=weights, adapters=adapter_names(config), **options)
    # what is unused depends on the model's shape, known only now
    refuse_unused(config, job_overrides(), [ENCODER_RULE if isinstance(loaded.model, Encoder) else WRITER_RULE])
    if not (config.embed or config.score or isinstance(loaded.model, Encoder) or loaded.model.config.writes):
        head = loaded.model.config.head
        other = "a model of scores or labels: set score=true" if head.scores else "a model of vectors: set embed=true"
        raise ConfigError(f"checkpoint={config.checkpoint}: writes no text, it is {other}")
    move_to(loaded.model, device, products or weights)
    # fused decoding needs weights and products in one dtype
    if products is None:
        prepare_for_decoding(loaded.model, rows=rows)
    mixed = torch.autocast(device.type, dtype=products, enabled=products is not None)
    with torch.inference_mode(), mixed:
        if config.embed:
            print_embeddings(loaded, prompts, config.pooling)
        elif config.score:
            print_scores(loaded, prompts, config.query)
        elif config.chat:
            return run_chat(config, loaded, device)
        elif isinstance(loaded.model, Encoder):
            print_candidates(loaded, prompts, config.top_k)
        else:
            print_continuations(config, loaded, prompts, device)
    return 0


def check_options(config: DictConfig) -> None:
    """ConfigError for values and combinations that cannot work, before anything is read."""
    for name in ("num_samples", "top_k"):
        if config[name] < 1:
            raise ConfigError(f"{name}={config[name]} must be at least 1")
    chosen = [f"{name}=true" for name in ("embed", "score", "logprobs", "chat") if config[name]]
    if len(chosen) > 1 and chosen != ["score=true", "logprobs=true"]:
        raise ConfigError(f"{' and '.join(chosen)}: choose one of them")
    if config.query is not None and not config.score:
        raise ConfigError("query is the first text of a pair to score: set score=true")
    if config.system is not None and not config.chat:
        raise ConfigError("system is what a chat begins with: set chat=true")
    if config.tools is not None and not config.chat:
        raise ConfigError("tools are what a chat may call: set chat=true")
    if config.chat and (config.num_samples > 1 or config.generation.num_return > 1):
        raise ConfigError("chat=true: an answer is one; set num_samples=1 and generation.num_return=1")
    if config.chat and len(adapter_names(config)) > 1 and config.adapter_weights is None:
        raise ConfigError("chat=true: several adapters answer together; give adapter_weights, or one adapter")
    refuse_unused(config, job_overrides(), GENERATE_RULES)


def run_chat(config: DictConfig, loaded: Loaded, device: torch.device) -> int:
    """Answer the prompts as turns of one conversation, or hold it at the terminal; the exit status."""
    names = adapter_names(config)
    assign_adapters(loaded.model, names, config.adapter_weights, 1)
    generator = torch.Generator(device).manual_seed(config.seed)
    options: GenerationConfig = OmegaConf.to_object(config.generation)
    tools = None if config.tools is None else load_tools(config.tools)
    chat = Chat(loaded, options, system=config.system, stream=config.stream, generator=generator, tools=tools)
    if config.prompt is None and config.prompt_file is None:
        return run_terminal(chat)
    answer_all(chat, read_prompts(config))
    return 0


def load_tools(names: str | list[str]) -> Tools:
    """The functions of the option `tools` by name, with 30 seconds for each call."""
    functions = []
    for name in [names] if isinstance(names, str) else names:
        module, _, attribute = str(name).rpartition(":")
        if not module:
            raise ConfigError(f"tools={name}: name a function as module:function or file.py:function")
        functions.append(named_object(f"tools={name}", module, attribute))
    return Tools(functions, option="tools", timeout=30.0)


def print_continuations(config: DictConfig, loaded: Loaded, prompts: list[str], device: torch.device) -> None:
    """Print continuations of the prompts. A single one streams while it is decoded; several are printed as blocks
    or JSON lines.

    With several adapters side by side each prompt is continued once per adapter, in one batch: every row has
    its own adapter.
    """
    options: GenerationConfig = OmegaConf.to_object(config.generation)
    names = adapter_names(config)
    row_weights = assign_adapters(loaded.model, names, config.adapter_weights, len(prompts))
    n_choices = 1 if row_weights is None else len(names)
    if n_choices > 1 and (options.num_beams > 1 or options.speculates):
        raise ConfigError("several adapters side by side go with sampling: give one, or adapter_weights")
    # rows: adapters outermost, then prompts, then samples
    n = options.num_return if options.num_beams > 1 else config.num_samples
    is_single = len(prompts) * n * n_choices == 1 and not config.logprobs
    streaming = config.stream and is_single
    if is_single:
        print(prompts[0], end=separator(loaded), flush=True)
    rows = [encode_prompt(loaded.tokenizer, prompt) for prompt in prompts] * n_choices
    # decode all rows together
    acceptance = Acceptance()
    completions_of_rows = complete(
        loaded.model,
        loaded.tokenizer,
        rows,
        options,
        generator=torch.Generator(device).manual_seed(config.seed),
        num_samples=config.num_samples,
        on_text=(lambda _, delta: print(delta, end="", flush=True)) if streaming else None,
        logprobs=config.logprobs,
        draft=load_draft(options.draft, loaded),
        acceptance=acceptance,
        row_weights=row_weights,
    )
    completions = [completion for of_row in completions_of_rows for completion in of_row]
    # print them, and then hints and statistics
    if is_single:
        print("" if streaming else completions[0].text, flush=True)
    else:
        for i, completion in enumerate(completions):
            name = names[i // (len(prompts) * n)] if n_choices > 1 else None
            print_completion(loaded, prompts[i // n % len(prompts)], completion, name, as_json=config.logprobs)
    if options.speculates:
        print(f"speculation: {acceptance}", file=sys.stderr)
    n_empty = sum(not completion.text.strip() for completion in completions)
    if line := usage_hint(loaded, prompts, n_empty=n_empty, n=len(completions)):
        print(line, file=sys.stderr)


def usage_hint(loaded: Loaded, prompts: list[str], *, n_empty: int, n: int) -> str | None:
    """A hint for a model that stopped at once, or a chat model that was asked without its template; None if all is
    well.

    n_empty of n completions are empty. A prompt with special tokens in it was written by someone who knows the
    template.
    """
    tokenizer = loaded.tokenizer
    at_once = "hint: the model ended its text at once" + (f", {n_empty} times of {n}" if n > 1 else "")
    if tokenizer.chat_template is None:
        advice = "; write the prompt as its training data has them, or set generation.min_new_tokens=1"
        return at_once + advice if n_empty else None
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special and token.content]
    if any(token in prompt for prompt in prompts for token in special):
        return at_once if n_empty else None
    if n_empty:
        return f"{at_once}; it has a chat template, so ask it as in a conversation: chat=true"
    if n == 1 and sys.stderr.isatty():
        return "hint: the model has a chat template, and the prompt was continued as bare text; chat=true asks it"
    return None


def print_completion(
    loaded: Loaded, prompt: str, completion: Completion, adapter: str | None, *, as_json: bool
) -> None:
    """Print one of several completions: prompt and text, or all about it as a JSON line."""
    if not as_json:
        heading = "" if adapter is None else f"[{adapter}] "
        print(f"{heading}{prompt}{separator(loaded)}{completion.text}\n{'-' * 40}", flush=True)
        return
    token_texts = [loaded.tokenizer.decode([token]) for token in completion.tokens]
    line = {"prompt": prompt, "text": completion.text, "tokens": token_texts, "logprobs": completion.logprobs}
    line |= {} if completion.score is None else {"score": completion.score}
    print_json(line if adapter is None else {"adapter": adapter, **line})


def separator(loaded: Loaded) -> str:
    """Text between prompt and completion: an encoder-decoder answers on a line of its own, a decoder continues the
    prompt.
    """
    return "\n" if loaded.model.config.shape is Shape.encoder_decoder else ""


def print_candidates(loaded: Loaded, prompts: list[str], top_k: int) -> None:
    """Print the most likely tokens for each mask of each prompt, with probabilities."""
    for prompt in prompts:
        candidates_of_masks = fill(loaded.model, loaded.tokenizer, prompt, top_k=top_k)
        print(prompt)
        for n, candidates in enumerate(candidates_of_masks, start=1):
            for candidate in candidates:
                print(f"{n:>4}  {candidate.probability:.4f}  {candidate.text}", flush=True)


def print_embeddings(loaded: Loaded, prompts: list[str], pooling: str | None) -> None:
    """Print one JSON line for each prompt with its vector. pooling: as in training, or what the model's folder
    says for null.
    """
    from genai_pl.evaluation.embeddings import embed, encode_sentences, find_sentence_head

    config = loaded.model.config
    if config.shape is Shape.encoder_decoder:
        raise ConfigError("embed=true needs an encoder or a decoder, this is an encoder-decoder")
    head = find_sentence_head(pooling, loaded.path, loaded.tokenizer, config)
    rows = encode_sentences(loaded.tokenizer, prompts, head, max_length=config.max_seq_len)
    for prompt, vector in zip(prompts, embed(loaded.model, rows, head).tolist(), strict=True):
        print_json({"prompt": prompt, "embedding": vector})


def print_scores(loaded: Loaded, prompts: list[str], query: str | None = None) -> None:
    """Print one JSON line for each prompt: log-probability and perplexity by a language model, a reward model's
    score, or labels with their probabilities. query: first text of pairs whose second text is the prompt.
    """
    from genai_pl.cli.scored_steps import scored_steps
    from genai_pl.evaluation.embeddings import encode_texts, logprobs, reward_scores
    from genai_pl.evaluation.labels import is_reward_model

    model, tokenizer = loaded.model, loaded.tokenizer
    if (lines := scored_steps(loaded, prompts, query)) is not None:
        for line in lines:
            print_json(line)
        return
    if model.config.head.scores and not is_reward_model(model):
        print_labels(loaded, prompts, query)
        return
    if query is not None:
        raise ConfigError("query is the first text of a pair, which a model with labels reads; leave it out here")
    if model.config.head is Head.score:
        rows = [row[-context_of(model) :] for row in encode_texts(tokenizer, prompts)]
        for prompt, reward in zip(prompts, reward_scores(model, rows).tolist(), strict=True):
            print_json({"prompt": prompt, "score": reward})
        return
    if model.config.shape is not Shape.decoder or not model.config.writes:
        raise ConfigError("score=true needs a decoder that predicts the next token, or a reward model")
    for prompt, (total, n) in zip(prompts, logprobs(model, tokenizer, None, prompts), strict=True):
        mean = total / n if n else None  # nothing precedes the first token of a text without a bos
        perplexity = None if mean is None else math.exp(-mean)
        print_json({"prompt": prompt, "logprob": total, "mean": mean, "perplexity": perplexity, "tokens": n})


def print_labels(loaded: Loaded, prompts: list[str], query: str | None) -> None:
    """Print one JSON line for each prompt with the labels of the model's head and their probabilities."""
    from genai_pl.config.labels import read_labels
    from genai_pl.data.text_tokens import encode_pairs
    from genai_pl.evaluation.labels import describe_labels, label_logits, probabilities, tag_words

    model, config = loaded.model, loaded.model.config
    max_length = context_of(model)
    if config.head is Head.tokens:
        if query is not None:
            raise ConfigError("query is the first text of a pair; this model gives tags to the words of a prompt")
        sentences = [prompt.split() for prompt in prompts]
        tags = tag_words(model, loaded.tokenizer, sentences, max_length=max_length)
        for prompt, words, row in zip(prompts, sentences, tags, strict=True):
            print_json({"prompt": prompt, "tokens": words, "tags": row})
        return
    labels = read_labels(config.extra, config.n_labels)
    if labels.pairs and query is None:
        raise ConfigError("query: the model reads pairs of texts; give the first of them, query='...'")
    texts = (prompts, None) if query is None else ([query] * len(prompts), prompts)
    rows = encode_pairs(loaded.tokenizer, *texts, max_length=max_length)
    for prompt, row in zip(prompts, probabilities(label_logits(model, rows), labels), strict=True):
        print_json({**({} if query is None else {"query": query}), "prompt": prompt, **describe_labels(row, labels)})


def print_json(line: dict[str, object]) -> None:
    """Print an object as one line; non-ASCII characters stay readable."""
    print(json.dumps(line, ensure_ascii=False), flush=True)


def adapter_names(config: DictConfig) -> list[str]:
    """Names of the adapters as a list, for null, one name or several."""
    if config.adapter is None:
        return []
    return [config.adapter] if isinstance(config.adapter, str) else list(config.adapter)


def assign_adapters(
    model: nn.Module, names: list[str], weights: list[float] | None, n_prompts: int
) -> RowWeights | None:
    """Weights of several adapters by row, or None where all rows share theirs, which are set here.

    weights: one factor per adapter, all of which then act on every row. Without weights several adapters divide
    the batch: rows are ordered by adapter, then by prompt. ConfigError unless there is a weight for each
    adapter.
    """
    adapters = adapters_of(model)[-len(names) :] if names else []
    if weights is not None:
        if len(weights) != len(names):
            raise ConfigError(f"adapter_weights has {len(weights)} numbers for {len(names)} adapters")
        for adapter, weight in zip(adapters, weights, strict=True):
            adapter.weight = float(weight)
        return None
    if len(names) < 2:
        return None
    adapter_ids = torch.arange(len(names), device=next(model.parameters()).device).repeat_interleave(n_prompts)
    return RowWeights([(adapter, (adapter_ids == n).float()) for n, adapter in enumerate(adapters)])


def read_prompts(config: DictConfig) -> list[str]:
    """The prompt option, the lines of prompt_file (empty ones skipped), or all of stdin as one prompt."""
    if config.prompt is not None:
        return [config.prompt]
    if config.prompt_file is None:
        return [sys.stdin.read()]
    path = Path(config.prompt_file).expanduser()
    try:
        with path.open(encoding="utf-8-sig") as file:  # a line ends where a file has a line break, nowhere else
            lines = [line.removesuffix("\n") for line in file]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"prompt_file={path}: cannot be read ({error})") from None
    if not any(lines):
        raise DataError(f"prompt_file={path}: empty")
    return [line for line in lines if line]
