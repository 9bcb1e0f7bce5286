"""The chat page in a browser: typing, streaming, stopping, and error messages."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="needs pip install -e '.[serve]'")

from genai_pl.serving.adapters import ServedAdapter
from tests.serving.fake import FakeEngine, FakeStream
from tests.serving.servers import eventually, make_service, serving, write_model

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


def test_what_goes_wrong_is_shown_and_keys_are_sent(page, tiny: Path) -> None:
    service = make_service(tiny, cache=None)
    service.engine = FakeEngine(["yes"], "deadline")
    with serving(service, keys=("secret",)) as client:
        page.goto(str(client.base_url))
        page.wait_for_selector(".turn.error")
        assert "give a key" in page.inner_text(".turn.error")
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
        assert page.inner_text(".turn.tool").endswith("= -10")
        page.locator(".note").nth(1).wait_for()
        say(page, "Thanks")
        page.locator(".turn.assistant", has_text="Bye.").wait_for()
        values = page.evaluate("['2^10', '7 % 4 - .5', '2 ** 3 ** 2', '1e3 / 3'].map(calculate)")
        refused = "(text) => { try { return calculate(text) } catch { return '!' } }"
        errors = f"['', '1 +', '(1', 'alert(1)', '1 / 0', '1 2'].map({refused})"
        assert page.evaluate(errors) == ["!"] * 6
    assert values == ["1024", "2.5", "512", "333.3333333333"]
    prompts = [bytes(t for t in request.input_ids if t < 256).decode() for request in service.engine.requests]
    assert prompts[1].endswith("</tool_call>[tool]-10[assistant]")
    assert prompts[2].endswith("[assistant]It is -10.[user]Thanks[assistant]")
