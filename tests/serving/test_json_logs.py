"""JSON logs: one object a line, with the id that the client gave its request."""

import json
import logging
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="needs pip install -e '.[serve]'")

from genai_pl.serving.errors import REQUEST
from genai_pl.serving.json_logs import JsonFormatter


def test_a_line_is_one_object_whatever_its_text() -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError as error:
        info = (type(error), error, error.__traceback__)
    record = logging.LogRecord("genai_pl.serving", logging.WARNING, "f", 1, "a %s\nb", ("x",), info)
    token = REQUEST.set("id-1")
    line = JsonFormatter().format(record)
    REQUEST.reset(token)
    assert "\n" not in line
    fields = json.loads(line)
    assert (fields["level"], fields["message"], fields["request"]) == ("warning", "a x\nb", "id-1")
    assert "ValueError: two\nlines" in fields["error"]


def test_a_request_has_a_line_with_its_own_id(tiny: Path, caplog: pytest.LogCaptureFixture) -> None:
    from tests.serving.servers import make_service, serving

    with (
        caplog.at_level(logging.INFO, logger="genai_pl.access"),
        serving(make_service(tiny, cache=None, log_format="json")) as client,
    ):
        reply = client.get("/v1/models", headers={"x-request-id": "trace-7.a"})
        assert reply.headers["x-request-id"] == "trace-7.a"
        forged = client.get("/v1/models/none", headers={"x-request-id": 'x" forged'})
        assert len(forged.headers["x-request-id"]) == 12
    fields = [record.fields for record in caplog.records if record.name == "genai_pl.access"]
    assert [(one["route"], one["status"]) for one in fields] == [("/v1/models", 200), ("/v1/models/{name:path}", 404)]
    assert all(one["seconds"] >= 0 for one in fields)
