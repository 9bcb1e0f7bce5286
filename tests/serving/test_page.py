"""The chat page in a browser: typing, streaming, stopping, and error messages."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="needs pip install -e '.[serve]'")

from genai_pl.environments.arithmetic import evaluate, number_text
from genai_pl.serving.adapters import ServedAdapter
from tests.serving.fake import FakeEngine, FakeStream
from tests.serving.servers import eventually, make_service, serving, write_model

ARITHMETIC = (
    "2^10", "7 % 4 - .5", "2 ** 3 ** 2", "1e3 / 3", "-7 // 2 + -7 % 3", "gcd(12, 18) * 2", "lcm(4, 6, 10)", "max(3, 2 + 2) ** 2",
    "sqrt(2)", "abs(-3)", "round(2.5)", "round(2.675, 1)", "1,234 + 1", "-2 ** 2", "(1 - 0.9) * 10", "12345678 * 9", "lcm(0, 3)",
)  # fmt: skip
NOT_ARITHMETIC = (
    "", "1 +", "(1", "alert(1)", "1 / 0", "1 2", "gcd 3", "gcd(1.5, 2)", "sqrt(-1)", "max()", "min(1", "toString(1)", "gcd(1,)",
)  # fmt: skip
CHROMIUM = shutil.which("chromium", path="/usr/bin:/usr/local/bin")


def test_the_page_is_one_file_that_loads_nothing_else(client) -> None:
    import re

    reply = client.get("/")
    assert reply.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in reply.headers["content-security-policy"]
    assert not re.findall(r"https?://", reply.text)
    assert not re.findall(r"<script[^>]+src|<link[^>]+href=\"(?!data:)|@import", reply.text)


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs pip install playwright")
    if CHROMIUM is None:
        pytest.skip("chromium is not installed (apt-get install chromium)")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser) -> Iterator[object]:
    page = browser.new_page(viewport={"width": 900, "height": 640})
    page.set_default_timeout(20_000)
    faults = []
    page.on("pageerror", lambda fault: faults.append(fault))
    yield page
    page.close()
    assert not faults


def say(page, text: str) -> None:
    page.fill("#input", text)
    page.press("#input", "Enter")


def test_a_conversation_goes_back_and_forth(page, tmp_path: Path) -> None:
    service = make_service(write_model(tmp_path / "tiny", max_seq_len=512), cache=None)
    service.engine = FakeEngine(["Hello ", "<b>you</b> ", "日本 🙂"])
    with serving(service) as client:
        page.goto(str(client.base_url))
        page.wait_for_selector("#model option", state="attached")
        assert page.input_value("#model") == "tiny"
        say(page, "Good day")
        page.wait_for_selector(".note")
        assert page.inner_text(".turn.user") == "Good day"
        assert page.inner_text(".turn.assistant") == "Hello <b>you</b> 日本 🙂"
        assert page.inner_text(".note").startswith("3 tokens")
        say(page, "And again")
        page.locator(".note").nth(1).wait_for()
        prompt = bytes(token for token in service.engine.requests[1].input_ids if token < 256).decode()
        for message in ("Good day", "Hello <b>you</b>", "And again"):
            assert message in prompt
        page.click("#clear")
        assert page.query_selector(".turn") is None


def test_a_stream_is_stopped(page, tiny: Path) -> None:
    service = make_service(tiny, cache=None)
    service.engine = FakeEngine(["for ever"], None)
    with serving(service) as client:
        page.goto(str(client.base_url))
        page.wait_for_selector("#model option", state="attached")
        say(page, "Go on")
        page.locator(".turn.assistant", has_text="for ever").wait_for()
        page.click("#stop")
        page.wait_for_selector(".note")
        assert "stopped" in page.inner_text(".note")
        assert eventually(service.engine.streams[0].cancelled.is_set)
        assert page.is_enabled("#send")


def test_an_answer_is_generated_again_and_a_question_changed(page, tmp_path: Path) -> None:
    service = make_service(write_model(tmp_path / "tiny", max_seq_len=512), cache=None)
    service.engine = FakeEngine(["yes"])

    def prompt() -> str:
        return bytes(token for token in service.engine.requests[-1].input_ids if token < 256).decode()

    def turns() -> list[str]:
        return page.locator(".turn").all_inner_texts()

    with serving(service) as client:
        page.goto(str(client.base_url))
        page.wait_for_selector("#model option", state="attached")
        assert page.is_disabled("#again")
        for n, text in enumerate(("First?", "Second?")):
            say(page, text)
            page.locator(".note").nth(n).wait_for()
        # the last answer again: the same conversation is asked, and shown once
        asked = prompt()
        page.click("#again")
        assert eventually(lambda: page.locator(".note").count() == 2 and page.is_enabled("#again"))
        assert len(service.engine.requests) == 3
        assert prompt() == asked
        assert turns() == ["First?", "yes", "Second?", "yes"]
        # the first question changed, by keyboard: what followed it is gone; Escape would have left all as it was
        page.get_by_role("button", name="Edit: First?").press("Enter")
        assert page.input_value("#input") == "First?"
        page.press("#input", "Escape")
        assert page.locator(".edited").count() == 0
        page.get_by_role("button", name="Edit: First?").press("Enter")
        say(page, "Third?")
        assert eventually(lambda: page.locator(".note").count() == 1 and page.is_enabled("#again"))
        assert turns() == ["Third?", "yes"]
        assert "Third?" in prompt()
        assert not {"First?", "Second?"} & set(prompt().replace("?", "? ").split())


def test_a_new_conversation_ends_the_answer_that_runs(page, tmp_path: Path) -> None:
    service = make_service(write_model(tmp_path / "tiny", max_seq_len=512), cache=None)
    service.engine = FakeEngine(["for ", "ever "], None)
    with serving(service) as client:
        page.goto(str(client.base_url))
        page.wait_for_selector("#model option", state="attached")
        say(page, "Go on")
        page.locator(".turn.assistant", has_text="for ever").wait_for()
        page.click("#clear")
        assert eventually(service.engine.streams[0].cancelled.is_set)
        page.wait_for_selector("#send:enabled")
        assert page.locator(".turn, .note").count() == 0
        assert page.is_disabled("#again")
        service.engine.make = lambda: FakeStream(["yes"], "stop")
        say(page, "Anew")
        page.wait_for_selector(".note")
        assert page.inner_text(".turn.assistant") == "yes"


def test_controls_have_names_and_turns_tell_who_speaks(page, tiny: Path) -> None:
    service = make_service(tiny, cache=None)
    service.engine = FakeEngine(["yes"])
    with serving(service) as client:
        page.goto(str(client.base_url))
        page.wait_for_selector("#model option", state="attached")
        names = ("model", "as", "tools", "temperature", "tokens", "key", "message", "New", "Send", "Stop", "Regenerate")
        tree = page.locator("body").aria_snapshot()
        assert all(f'"{name}"' in tree for name in names), tree
        say(page, "Well?")
        page.wait_for_selector(".note")
        tree = page.locator("#log").aria_snapshot()
        for part in ('log "conversation"', 'article "you"', 'article "assistant"', 'button "Edit: Well?"'):
            assert part in tree, tree
        # nothing is wider than a phone
        page.set_viewport_size({"width": 360, "height": 640})
        assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_what_goes_wrong_is_shown_and_keys_are_sent(page, tiny: Path) -> None:
    service = make_service(tiny, cache=None)
    service.engine = FakeEngine(["yes"], "deadline")
    with serving(service, keys=("secret",)) as client:
        page.goto(str(client.base_url))
        page.wait_for_selector(".turn.error")
        assert "asks for a key" in page.inner_text(".turn.error")
        page.fill("#key", "secrets")
        page.press("#key", "Tab")
        page.wait_for_selector(".turn.error:has-text('does not know the key')")
        page.fill("#key", "secret")
        page.press("#key", "Tab")
        page.wait_for_selector("#model option", state="attached")
        page.click("#clear")
        say(page, "Well?")
        page.wait_for_selector(".turn.error")
        assert page.inner_text(".turn.assistant") == "yes"
        assert "not finished in time" in page.inner_text(".turn.error")


def test_adapters_are_chosen_by_name(page, tiny: Path) -> None:
    service = make_service(tiny, cache=None)
    service.adapters.by_name["polite"] = ServedAdapter("polite", "polite", tiny, "", 0)  # the engine is not the model's
    service.engine = FakeEngine(["yes"])
    with serving(service) as client:
        page.goto(str(client.base_url))
        page.wait_for_selector("#model option[value=polite]", state="attached")
        page.select_option("#model", "polite")
        page.select_option("#mode", "text")
        say(page, "Once upon")
        page.wait_for_selector(".note")
    assert service.engine.requests[0].adapter == "polite"
    assert bytes(service.engine.requests[0].input_ids) == b"Once upon"


def test_a_calculator_is_called_and_its_result_goes_back_to_the_model(page, tmp_path: Path) -> None:
    template = (
        "{% if tools %}{{ tools[0].function.name }}{% endif %}{% for m in messages %}[{{ m.role }}]{{ m.content or '' }}"
        "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    folder = write_model(tmp_path / "caller", template=False, max_seq_len=512)
    (folder / "chat_template.jinja").write_text(template)
    service = make_service(folder, cache=None)
    service.engine = FakeEngine([])
    call = '<tool_call>{"name": "calculate", "arguments": {"expression": "(2 + 3) * -4 ** 2 / 8"}}</tool_call>'
    texts = iter([[call], ["It is ", "-10."], ["Bye."]])
    service.engine.make = lambda: FakeStream(next(texts), "stop")
    with serving(service) as client:
        page.goto(str(client.base_url))
        page.wait_for_selector("#model option", state="attached")
        page.select_option("#tools", "calculate")
        say(page, "Compute it.")
        page.locator(".turn.assistant", has_text="It is -10.").wait_for()
        page.locator(".note").nth(1).wait_for()
        kinds = page.eval_on_selector_all("#log > div", "turns => turns.map((turn) => turn.className)")
        assert kinds == ["turn user", "turn tool", "note", "turn assistant", "note"]
        assert page.inner_text(".turn.tool").split(None, 1) == ["calculate", "(2 + 3) * -4 ** 2 / 8 = -10"]
        say(page, "Thanks")
        page.locator(".turn.assistant", has_text="Bye.").wait_for()
        values = page.evaluate("(texts) => texts.map(calculate)", ARITHMETIC)
        refused = "(texts) => texts.map((text) => { try { return calculate(text) } catch { return '!' } })"
        assert page.evaluate(refused, NOT_ARITHMETIC) == ["!"] * len(NOT_ARITHMETIC)
    # the environment in which a model learns to call it has the same values
    assert values == [number_text(evaluate(text)) for text in ARITHMETIC]
    prompts = [bytes(t for t in request.input_ids if t < 256).decode() for request in service.engine.requests]
    assert prompts[1].endswith("</tool_call>[tool]-10[assistant]")
    assert prompts[2].endswith("[assistant]It is -10.[user]Thanks[assistant]")
