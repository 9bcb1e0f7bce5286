import random

import pytest

from genai_pl.generation import Detokenizer, StopFilter

TEXT = "naïve 🙂🙃 漢字かな — e\u0301 \ufffd ¿qué? 👩‍👩‍👧 "


def pieces(tokenizer, prompt: list[int], tokens: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer, prompt)
    return [detokenizer.push(token) for token in tokens]


def test_characters_of_several_byte_tokens_come_out_whole(byte_tokenizer):
    assert pieces(byte_tokenizer, [], list("né🙂".encode())) == ["n", "", "é", "", "", "", "🙂"]


def test_a_long_text_comes_back_whatever_the_byte_borders(byte_tokenizer):
    assert "".join(pieces(byte_tokenizer, [], list((5 * TEXT).encode()))) == 5 * TEXT


def test_random_bytes_decode_as_python_decodes_them(byte_tokenizer):
    rng = random.Random(0)
    for _ in range(30):
        data = bytes(rng.choices([*b"ab", 0xC3, 0xA9, 0xF0, 0x9F, 0x99, 0x82, 0xFF], k=60))
        expected = data.decode("utf-8", errors="replace").rstrip("\ufffd")
        assert "".join(pieces(byte_tokenizer, [], list(data))).rstrip("\ufffd") == expected


def test_text_does_not_depend_on_where_the_prompt_ends(byte_tokenizer):
    for text in ("plain", TEXT):
        for cut in range(len(text)):
            prompt, rest = text[:cut], text[cut:]
            assert "".join(pieces(byte_tokenizer, list(prompt.encode()), list(rest.encode()))) == rest


@pytest.mark.parametrize("prompt", ["Hello", "Hello world how", "you are"])
def test_leading_spaces_of_words_survive(word_tokenizer, prompt):
    rest = " world how are you a bc" * 4
    tokens = word_tokenizer.encode(prompt + rest)
    n = len(word_tokenizer.encode(prompt))
    assert tokens[:n] == word_tokenizer.encode(prompt)
    assert "".join(pieces(word_tokenizer, tokens[:n], tokens[n:])) == rest


def test_bytes_that_stand_for_unknown_characters_come_out_whole(word_tokenizer):
    text = "Hello é🙂漢字 how 漢字かな are you" + 10 * "漢"
    tokens = word_tokenizer.encode(text)
    deltas = pieces(word_tokenizer, [], tokens)
    assert "".join(deltas) == text
    assert not any("\ufffd" in piece for piece in deltas)


def test_a_prompt_of_bytes_goes_on_in_bytes(word_tokenizer):
    for n in range(1, 12):
        prompt, rest = "漢" * n, "漢字 how 漢"
        tokens = word_tokenizer.encode(prompt + rest)
        n_prompt = len(word_tokenizer.encode(prompt))
        assert "".join(pieces(word_tokenizer, tokens[:n_prompt], tokens[n_prompt:])) == rest


def test_special_tokens_have_no_text(byte_tokenizer):
    assert pieces(byte_tokenizer, [256], [*b"a", 256, *b"b"]) == ["a", "", "b"]


def streamed(stop: list[str], *parts: str) -> tuple[list[str], bool]:
    stop_filter = StopFilter(stop)
    deltas = []
    for part in parts:
        deltas.append(stop_filter.push(part))
        if stop_filter.matched:
            return deltas, True
    return [*deltas, stop_filter.close()], False


def test_nothing_of_a_stop_string_passes():
    assert streamed(["END"], "a E", "N", "D b") == (["a ", "", ""], True)


def test_what_only_began_like_a_stop_string_is_set_free():
    assert streamed(["END"], "E", "NE", "x") == (["", "EN", "Ex", ""], False)
    assert streamed(["END"], "aEN") == (["a", "EN"], False)


def test_a_stop_string_that_overlaps_itself_is_found():
    assert streamed(["aab"], "a", "a", "a", "b") == (["", "", "a", ""], True)


def test_the_borders_of_pieces_make_no_difference():
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choices("abc", k=12))
        stop = ["".join(rng.choices("abc", k=rng.randint(1, 4))) for _ in range(rng.randint(1, 3))]
        ends = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
        expected = (text[: min(ends)[1]], True) if ends else (text, False)
        cuts = sorted(rng.sample(range(1, 12), rng.randint(0, 11)))
        parts = [text[i:j] for i, j in zip([0, *cuts], [*cuts, 12], strict=True)]
        deltas, ended = streamed(stop, *parts)
        assert ("".join(deltas), ended) == expected
