"""Adapters that are loaded, replaced and deleted while the server runs."""

import json
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("fastapi", reason="needs pip install -e '.[serve]'")

import httpx

from genai_pl import load, peft
from genai_pl.errors import ConfigError
from genai_pl.peft import adapters_of, save_adapter
from genai_pl.serving.settings import ADMIN_KEYS, Settings, read_admin_keys, read_keys
from tests.serving.engines import Slow
from tests.serving.servers import eventually, make_service, serving

ADMIN = {"authorization": "Bearer admin"}
PROMPT = "Once upon a time there was a king"  # two blocks of the prefix cache


def write_adapter(base: Path, folder: Path, seed: int, make=peft.lora) -> Path:
    """An adapter with random weights that change every token."""
    torch.manual_seed(seed)
    model = make(load(str(base)).model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    save_adapter(model, folder, base=str(base))
    return folder


@pytest.fixture(scope="module")
def root(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the adapters a and b, a damaged one, and links that lead out."""
    root = tmp_path_factory.mktemp("adapters")
    outside = write_adapter(tiny, tmp_path_factory.mktemp("elsewhere") / "outside", 3)
    write_adapter(tiny, root / "a", 1)
    write_adapter(tiny, root / "run" / "adapter", 2)
    (root / "link").symlink_to(outside)
    inner = root / "inner"
    inner.mkdir()
    (inner / "adapter_config.json").write_bytes((root / "a" / "adapter_config.json").read_bytes())
    (inner / "adapter_model.safetensors").symlink_to(outside / "adapter_model.safetensors")
    return root


@pytest.fixture(scope="module")
def texts(tiny: Path, root: Path) -> dict[str, str]:
    """The text that continues PROMPT by each adapter, of a server that has them from its start."""
    service = make_service(tiny, adapters={"a": str(root / "a"), "b": str(root / "run")})
    with serving(service) as client:
        return {name: ask(client, name) for name in ("tiny", "a", "b")}


def ask(client: httpx.Client, model: str) -> str:
    reply = client.post("/v1/completions", json={"model": model, "prompt": PROMPT, "max_tokens": 24, "temperature": 0})
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]["text"]


def change(client: httpx.Client, name: str, path: object) -> httpx.Response:
    return client.post("/admin/adapters", json={"name": name, "path": str(path)}, headers=ADMIN)


def test_a_loaded_adapter_answers_as_one_that_was_there_from_the_start(tiny: Path, root: Path, texts) -> None:
    assert len(set(texts.values())) == 3
    service = make_service(tiny, adapters_root=str(root))
    base = {name: tensor.clone() for name, tensor in service.model.state_dict().items()}
    with serving(service, admin_keys=("admin",)) as client:
        assert ask(client, "tiny") == texts["tiny"]
        assert client.get("/admin/adapters", headers=ADMIN).json() == {"adapters": [], "root": str(root)}
        assert change(client, "mine", "a").json() == {"name": "mine", "done": "loaded"}
        assert ask(client, "mine") == texts["a"]
        assert ask(client, "tiny") == texts["tiny"]
        # a run's folder stands for its adapter; the cache of answers, and that of prefixes, tell old and new apart
        assert change(client, "mine", root / "run").json() == {"name": "mine", "done": "replaced"}
        for _ in range(2):
            assert ask(client, "mine") == texts["b"]
        models = client.get("/v1/models").json()["data"]
        assert [(entry["id"], entry["parent"]) for entry in models] == [("tiny", None), ("mine", "tiny")]
        assert abs(models[1]["created"] - time.time()) < 60
        [entry] = client.get("/admin/adapters", headers=ADMIN).json()["adapters"]
        assert (entry["name"], entry["path"]) == ("mine", str(root / "run" / "adapter"))
        metrics = client.get("/metrics").text
        assert 'genai_pl_adapters{state="served"} 1.0' in metrics
        assert 'genai_pl_adapters{state="leaving"} 0.0' in metrics
        # embeddings and scores take their turns with it
        score = {"text": "a king", "prompt": "Once"}
        scores = [client.post("/score", json={**score, "model": name}).json()["scores"] for name in ("tiny", "mine")]
        assert scores[0] != scores[1]
        # deleted: its name is free, and nothing of it is left in the model
        assert client.delete("/admin/adapters/mine", headers=ADMIN).json() == {"name": "mine", "done": "deleted"}
        assert client.delete("/admin/adapters/mine", headers=ADMIN).status_code == 404
        assert client.post("/v1/completions", json={"model": "mine", "prompt": "x"}).status_code == 404
        assert eventually(lambda: not adapters_of(service.model))
        assert ask(client, "tiny") == texts["tiny"]
    assert {name: tensor.tolist() for name, tensor in service.model.state_dict().items()} == {
        name: tensor.tolist() for name, tensor in base.items()
    }


def test_a_request_that_runs_keeps_the_old_weights(tiny: Path, root: Path, texts) -> None:
    service, slow = make_service(tiny, adapters_root=str(root), cache=None), Slow()
    blocks = service.engine.model_runner.prefix_blocks
    with serving(service, admin_keys=("admin",)) as client:
        assert change(client, "mine", "a").status_code == 200
        old = service.adapters.by_name["mine"]
        hook = service.model.blocks[0].register_forward_pre_hook(lambda _, inputs: slow(None, inputs))
        body = {"model": "mine", "prompt": PROMPT, "max_tokens": 24, "temperature": 0, "stream": True}
        with client.stream("POST", "/v1/completions", json=body) as reply:
            lines = (line.removeprefix("data: ") for line in reply.iter_lines() if line)
            first = next(lines)
            assert slow.entered.wait(20)
            # replaced between two of its steps
            for _ in range(30):
                slow.gate.release()
            assert change(client, "mine", "run").json()["done"] == "replaced"
            hook.remove()
            assert ask(client, "mine") == texts["b"]
            events = [json.loads(line) for line in (first, *lines) if line != "[DONE]"]
        assert "".join(event["choices"][0]["text"] for event in events) == texts["a"]
        # then the old one leaves, with its blocks
        assert eventually(lambda: old.key not in service.engine.adapters.adapters)
        assert len(adapters_of(service.model)) == 1
        [now] = service.engine.adapters.adapters.values()
        assert {key[0] for key in blocks.places if isinstance(key[0], str)} == {f"adapter {now.number}"}
        assert len(blocks.places) + len(blocks.freed) <= len(blocks.pool)
        assert ask(client, "mine") == texts["b"]


def test_an_adapter_stays_as_long_as_a_request_may_still_need_it(tiny: Path, root: Path) -> None:
    service = make_service(tiny, adapters={"a": str(root / "a")}, adapters_root=str(root))
    service.engine.start()
    service.engine.use_adapter("a", 1)
    service.engine.retire_adapter("a")
    assert service.engine.run_between_steps(lambda: len(adapters_of(service.model))).result(20) == 1
    service.engine.use_adapter("a", -1)
    assert eventually(lambda: not service.engine.adapters.adapters)
    service.engine.stop(drain=False)


REFUSED = {
    "above": ("x", "../", 403, "path"),
    "absolute": ("x", "/etc", 403, "path"),
    "a link": ("x", "link", 403, "path"),
    "a linked file": ("x", "inner", 403, "path"),
    "nothing": ("x", "none", 404, "path"),
    "no adapter": ("x", ".", 404, "path"),
    "a NUL": ("x", "a\0b", 422, "path"),
    "half a pair": ("x", "\ud800", 422, "path"),
    "too long": ("x", "a" * 4000, 422, "path"),
    "the base": ("tiny", "a", 422, "name"),
    "a name with a slash": ("../x", "a", 422, "name"),
    "damaged": ("x", "damaged", 422, "path"),
    "too large": ("x", "large", 422, "path"),
    "virtual": ("x", "virtual", 422, "path"),
    "quantized": ("x", "quantized", 422, "path"),
}


def test_what_cannot_be_loaded_is_refused_and_changes_nothing(tiny: Path, root: Path, texts, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    # weights that break off, that do not fit, that change how requests are batched, and that need another base
    damaged, large = root / "damaged", root / "large"
    for folder in (damaged, large):
        folder.mkdir()
        (folder / "adapter_config.json").write_bytes((root / "a" / "adapter_config.json").read_bytes())
    (damaged / "adapter_model.safetensors").write_bytes((root / "a" / "adapter_model.safetensors").read_bytes()[:-100])
    tensors = load_file(root / "a" / "adapter_model.safetensors")
    wide = {name: tensor.repeat(1, 2) if "lora_A" in name else tensor for name, tensor in tensors.items()}
    save_file(wide, large / "adapter_model.safetensors")
    write_adapter(tiny, root / "virtual", 4, lambda model: peft.prefix(model, n_tokens=3))
    write_adapter(tiny, root / "quantized", 5, lambda model: peft.lora(model, quantize="int8"))

    service = make_service(tiny, adapters_root=str(root))
    with serving(service, keys=("user",), admin_keys=("admin",)) as client:
        user = {"authorization": "Bearer user"}
        for case, (name, path, status, param) in REFUSED.items():
            content = json.dumps({"name": name, "path": path}).encode()
            headers = {**ADMIN, "content-type": "application/json"}
            reply = client.post("/admin/adapters", content=content, headers=headers)
            error = reply.json()["error"]
            assert (reply.status_code, error["param"]) == (status, param), (case, reply.text)
            assert "\n" not in error["message"]
        assert not adapters_of(service.model)
        assert client.post("/admin/adapters", json={"name": "x"}, headers=ADMIN).status_code == 422
        # keys of users open no admin route, nor the other way round
        for headers in ({}, user, {"x-api-key": "user"}):
            for method in ("GET", "POST", "DELETE", "OPTIONS"):
                assert client.request(method, "/admin/adapters", headers=headers).status_code == 401
        assert client.get("/v1/models", headers=ADMIN).status_code == 401
        assert client.get("/v1/models", headers=user).status_code == 200
        client.headers.update(user)
        assert ask(client, "tiny") == texts["tiny"]


def test_without_a_key_there_is_no_such_route(tiny: Path, root: Path) -> None:
    for options in ({"adapters_root": str(root)}, {}):
        admin_keys = () if options else ("admin",)
        with serving(make_service(tiny, **options), admin_keys=admin_keys) as client:
            assert change(client, "x", "a").status_code == 404
            assert "/admin/adapters" not in client.get("/openapi.json").json()["paths"]


def test_options_that_cannot_work_are_refused(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ADMIN_KEYS, raising=False)
    wrong = [
        {"backend": "openai", "url": "http://x/v1"},
        {"dtype": "int8"},
        {"workers": 2},
    ]
    for options in wrong:
        with pytest.raises(ConfigError, match="adapters_root"):
            Settings(adapters_root=str(root), **options)
    with pytest.raises(ConfigError, match="no such folder"):
        Settings(adapters_root=str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="without adapters_root"):
        Settings(admin_keys="keys.txt")
    settings = Settings(adapters_root=str(root))
    with pytest.raises(ConfigError, match="needs a key"):
        read_admin_keys(settings, [])
    monkeypatch.setenv(ADMIN_KEYS, "one, two")
    assert read_admin_keys(settings, ["three"]) == ["one", "two"]
    assert read_admin_keys(Settings(), []) == []
    assert read_keys(None) == []
    with pytest.raises(ConfigError, match="api_keys as well"):
        read_admin_keys(settings, ["two"])
