"""Teachers by name: `objective.teacher` as a model beside the student, a server, or a file that distill.py has written."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from genai_pl.config.enums import Shape
from genai_pl.endpoints import ADDRESSES
from genai_pl.errors import ConfigError
from genai_pl.loading import Loaded, load
from genai_pl.modules.distillation import DistillModule
from genai_pl.modules.served_teacher import ServedTeacher, Server
from genai_pl.modules.teacher_cache import TeacherCache
from genai_pl.modules.teachers import FileTeacher, ModelTeacher, RowTeacher, TextTeacher
from genai_pl.modules.text_alignment import TextAlignment
from genai_pl.peft import hold_base_in_16_bits

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OPTION = "objective.teacher"


def build_teacher(
    module: DistillModule, tokenizer: "PreTrainedTokenizerBase", *, in_16_bits: bool = False
) -> RowTeacher:
    """The teacher that a module names; ConfigError for one whose tokens are not the student's.

    Token ids are handed on: the student's tokens must be the teacher's, unless text is (`objective.universal`).
    """
    name = module.teacher_name
    if name.startswith(ADDRESSES):
        return served_teacher(module, tokenizer)
    if TeacherCache.is_at(Path(name)):
        return file_teacher(module)
    loaded = load_teacher(name)
    size = module.model.config.vocab_size
    if in_16_bits:
        hold_base_in_16_bits(loaded.model)
    if module.universal:
        alignment = TextAlignment(tokenizer, loaded.tokenizer, vocab_size=size, longest=loaded.model.config.max_seq_len)
        return TextTeacher(loaded.model, alignment, temperature=module.temperature)
    check_tokenizer(name, loaded, tokenizer)
    if (found := loaded.model.config.vocab_size) != size:
        raise ConfigError(
            f"{OPTION}={name}: predicts {found:,} tokens, the student has {size:,}; they must share a vocabulary"
        )
    return ModelTeacher(loaded.model, temperature=module.temperature)


def load_teacher(name: str, *, dtype: torch.dtype = torch.float32, option: str = OPTION) -> Loaded:
    """A decoder that writes text; ConfigError for another model."""
    loaded = load(name, dtype=dtype, option=option)
    if loaded.model.config.shape is not Shape.decoder or not loaded.model.config.head.predicts_tokens:
        raise ConfigError(f"{option}={name}: a decoder that writes text is needed")
    return loaded


def check_tokenizer(name: str, loaded: Loaded, tokenizer: "PreTrainedTokenizerBase", *, option: str = OPTION) -> None:
    """ConfigError for a teacher with another tokenizer than the student's."""
    if loaded.tokenizer.get_vocab() != tokenizer.get_vocab():
        raise ConfigError(
            f"{option}={name}: its tokenizer is another one than the student's; start from it (tokenizer=pretrained "
            f"tokenizer.name={name}, or init_from={name} init_layers=N), or set objective.universal=true"
        )


def served_teacher(module: DistillModule, tokenizer: "PreTrainedTokenizerBase") -> ServedTeacher:
    """The teacher behind an address; ConfigError for options that it cannot follow."""
    name, size = module.teacher_name, module.model.config.vocab_size
    if module.universal:
        raise ConfigError(
            f"{OPTION}={name}: objective.universal=true needs all probabilities, and a server gives the likeliest"
        )
    top_k = module.top_k or module.server.top_k
    options = {"top_k": top_k, "vocab_size": size, "temperature": module.temperature}
    return open_served_teacher(name, module.server, tokenizer, **options)


def open_served_teacher(
    url: str,
    server: Server,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    top_k: int,
    vocab_size: int,
    temperature: float,
    option: str = OPTION,
) -> ServedTeacher:
    """The teacher behind an address, whose tokens have been compared with the student's.

    top_k: likeliest tokens of a position. vocab_size: the student's. temperature: of the loss. option: that names the address.
    """
    if temperature != 1:
        raise ConfigError(
            f"{option}={url}: a server gives probabilities at temperature 1; set {option.replace('teacher', 'temperature')}=1, "
            f"not {temperature}"
        )
    if top_k >= vocab_size:
        raise ConfigError(f"top_k={top_k} must be from 1 to {vocab_size - 1}, one below the vocabulary")
    teacher = ServedTeacher(url, server, top_k=top_k, vocab_size=vocab_size, option=option)
    teacher.check_tokenizer(tokenizer)
    return teacher


def file_teacher(module: DistillModule) -> FileTeacher:
    """The teacher of a file; ConfigError for options that it has settled."""
    option, cache = f"{OPTION}={module.teacher_name}", TeacherCache(Path(module.teacher_name))
    if module.universal:
        raise ConfigError(f"{option}: a file holds tokens of the student's own; set objective.universal=false")
    if module.top_k not in (None, cache.contents.top_k):
        raise ConfigError(f"{option}: holds {cache.contents.top_k} tokens of a position; leave objective.top_k null")
    return FileTeacher(cache, vocab_size=module.model.config.vocab_size)
