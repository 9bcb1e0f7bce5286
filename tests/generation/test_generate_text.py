import pytest
import torch

from genai_pl.config.generation import GenerationConfig
from genai_pl.errors import ConfigError
from genai_pl.generation import generate, generate_text, left_pad

EOS = 256  # of the byte tokenizer


def greedy(n: int = 100, stop: tuple[str, ...] = ()) -> GenerationConfig:
    return GenerationConfig(max_new_tokens=n, temperature=0, stop=list(stop))


def seed(n: int) -> torch.Generator:
    return torch.Generator().manual_seed(n)


class Screen:
    """The text of each row as a user would see it: the sum of its deltas."""

    def __init__(self) -> None:
        self.pieces: dict[int, list[str]] = {}

    def __call__(self, row: int, piece: str) -> None:
        assert piece
        self.pieces.setdefault(row, []).append(piece)

    def texts(self) -> list[str]:
        return ["".join(self.pieces[row]) for row in sorted(self.pieces)]


def test_rows_are_padded_on_the_left():
    input_ids, segment_ids = left_pad([[1, 2, 3], [4]], 9)
    assert input_ids.tolist() == [[1, 2, 3], [9, 9, 4]]
    assert segment_ids.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_rows_of_equal_length_need_no_segments():
    assert left_pad([[1, 2], [3, 4]], 0)[1] is None


def test_streamed_pieces_are_whole_characters_and_add_up_to_the_text(scripted, byte_tokenizer):
    screen, text = Screen(), "né 漢字 🙂!"
    model = scripted([*text.encode(), EOS])
    assert generate_text(model, byte_tokenizer, ["x"], greedy(), on_text=screen) == [[text]]
    assert screen.pieces[0] == list(text)


def test_a_character_that_is_cut_short_is_left_out(scripted, byte_tokenizer):
    screen = Screen()
    assert generate_text(scripted("aé🙂"), byte_tokenizer, ["x"], greedy(5), on_text=screen) == [["aé"]]
    assert screen.texts() == ["aé"]


def test_eos_ends_each_row_in_its_own_time_and_is_not_in_the_text(scripted, byte_tokenizer):
    screen = Screen()
    model = scripted([*b"one", EOS], [*b"and two", EOS, *b"!"])
    assert generate_text(model, byte_tokenizer, ["x", "xyz"], greedy(), on_text=screen) == [["one"], ["and two"]]
    assert screen.texts() == ["one", "and two"]
    assert model.n_read == 8  # it stops when the last row has ended


def test_a_stop_string_across_tokens_is_cut_off_and_never_shown(scripted, byte_tokenizer):
    screen = Screen()
    model = scripted("Yes.\nUse\n\nUser: more", "No.")
    config = greedy(21, stop=("\n\nUser", "###"))
    assert generate_text(model, byte_tokenizer, ["x", "x"], config, on_text=screen)[0] == ["Yes.\nUse"]
    assert screen.texts()[0] == "Yes.\nUse"


def test_the_start_of_a_stop_string_at_the_very_end_is_shown(scripted, byte_tokenizer):
    screen = Screen()
    assert generate_text(scripted("ab##"), byte_tokenizer, ["x"], greedy(4, stop=("###",)), on_text=screen) == [
        ["ab##"]
    ]
    assert screen.texts() == ["ab##"]


def test_a_special_token_can_be_a_stop_string(scripted, byte_level_tokenizer):
    tokenizer = byte_level_tokenizer(eos_token="<eos>", pad_token="<turn>")
    turn = tokenizer.pad_token_id
    model = scripted([*b"hi", turn, *b"there"])
    assert generate_text(model, tokenizer, ["x"], greedy(stop=("<turn>",))) == [["hi"]]


def test_the_text_is_that_of_the_generated_tokens(small_model, word_tokenizer):
    model, prompt = small_model(), "Hello world"
    ids = torch.tensor([word_tokenizer.encode(prompt)])
    tokens = generate(model, ids, GenerationConfig(max_new_tokens=40), seed(4))[0]
    screen = Screen()
    [[text]] = generate_text(
        model, word_tokenizer, [prompt], GenerationConfig(max_new_tokens=40), generator=seed(4), on_text=screen
    )
    whole = word_tokenizer.decode(tokens, skip_special_tokens=True)
    assert whole.startswith(prompt)
    assert text.replace("\ufffd", "") == whole[len(prompt) :].replace("\ufffd", "")
    assert screen.texts() == [text]


def test_each_prompt_gets_its_samples_and_rows_are_numbered_in_that_order(small_model, byte_tokenizer):
    screen, config = Screen(), GenerationConfig(max_new_tokens=30)
    options = {"num_samples": 3, "generator": seed(0), "on_text": screen}
    texts = generate_text(small_model(), byte_tokenizer, ["ab", "c"], config, **options)
    assert [len(samples) for samples in texts] == [3, 3]
    assert screen.texts() == [text for samples in texts for text in samples]
    assert len({text for samples in texts for text in samples}) == 6


def test_prompts_of_one_batch_do_not_disturb_each_other(small_model, byte_tokenizer):
    model, prompts = small_model(), ["a", "a longer one", "mid"]
    together = generate_text(model, byte_tokenizer, prompts, greedy(30))
    assert together == [generate_text(model, byte_tokenizer, [prompt], greedy(30))[0] for prompt in prompts]


def test_the_same_seed_gives_the_same_text_and_another_another(small_model, byte_tokenizer):
    model, config = small_model(), GenerationConfig(max_new_tokens=30)
    first, same, other = (generate_text(model, byte_tokenizer, ["ab"], config, generator=seed(s)) for s in (1, 1, 2))
    assert first == same
    assert first != other


def test_an_empty_prompt_begins_with_bos_or_else_with_eos(scripted, byte_tokenizer, byte_level_tokenizer):
    for tokenizer in (byte_level_tokenizer(bos_token="<bos>", eos_token="<eos>"), byte_tokenizer):
        model = scripted("hi")
        assert generate_text(model, tokenizer, [""], greedy(2)) == [["hi"]]
        assert model.prompt.tolist() == [[256]]


def test_an_empty_prompt_without_bos_and_eos_is_an_error(scripted, byte_level_tokenizer):
    with pytest.raises(ConfigError, match="neither a bos nor an eos"):
        generate_text(scripted("hi"), byte_level_tokenizer(), [""], greedy())


def test_a_tokenizer_with_more_tokens_than_the_model_is_an_error(small_model, byte_tokenizer):
    with pytest.raises(ConfigError, match="token 120, the model knows 100"):
        generate_text(small_model(vocab_size=100), byte_tokenizer, ["x"], greedy())


def test_no_prompts_give_no_texts(small_model, byte_tokenizer):
    assert generate_text(small_model(), byte_tokenizer, [], greedy()) == []


def test_a_reader_that_leaves_stops_the_decoding(small_model, byte_tokenizer):
    model = small_model().train()

    def leave(row: int, piece: str) -> None:
        raise ConnectionError

    with pytest.raises(ConnectionError):
        generate_text(model, byte_tokenizer, ["x"], greedy(), on_text=leave)
    assert model.training


def test_ids_without_a_token_have_no_text(scripted, byte_tokenizer):
    model = scripted([*b"a", 300, *b"b", EOS])  # a vocabulary that was padded to a round number
    assert generate_text(model, byte_tokenizer, ["x"], greedy()) == [["ab"]]
