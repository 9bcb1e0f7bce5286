"""Adapters of one base, selected by the name in a request."""
# ruff: noqa: E402 (what is imported below needs what is asked for first)

from pathlib import Path

import pytest
import torch

pytest.importorskip("fastapi", reason="needs pip install -e '.[serve]'")
peft = pytest.importorskip("peft", reason="needs pip install peft")

from genai_pl.errors import ConfigError
from tests.serving.servers import make_service, serving


def write_adapter(base: Path, folder: Path, seed: int) -> Path:
    """A LoRA adapter written by PEFT, with random weights that are large enough to change every token."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    config = peft.LoraConfig(r=4, lora_alpha=64, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return folder


def greedy(base: Path, adapter: Path | None, prompt: bytes, n: int) -> list[int]:
    """The tokens that transformers and PEFT generate."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, adapter)
    ids = list(prompt)
    for _ in range(n):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def read(base: Path, adapter: Path | None, text: bytes) -> tuple[torch.Tensor, float]:
    """The last hidden state of transformers and PEFT as a unit vector, and the log-probability of what follows `Once`."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, adapter)
    ids = torch.tensor([list(text)])
    with torch.no_grad():
        result = model(input_ids=ids, output_hidden_states=True)
    logprobs = result.logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
    return torch.nn.functional.normalize(result.hidden_states[-1][0, -1], dim=0), float(logprobs[3:].sum())


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # of PEFT
def test_an_adapter_with_the_name_of_the_model_is_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="adapter: base is the model's own name"):
        make_service(tiny, name="base", adapters={"base": str(write_adapter(tiny, tmp_path / "lora", 1))})


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # of PEFT
def test_each_name_answers_with_its_adapter(tiny: Path, tmp_path: Path) -> None:
    folders = {name: write_adapter(tiny, tmp_path / name, seed) for seed, name in enumerate(("polite", "rude"), 1)}
    service = make_service(tiny, adapters={name: str(path) for name, path in folders.items()})
    body = {"prompt": "Once upon", "max_tokens": 8, "temperature": 0, "logprobs": 0}
    with serving(service) as client:
        models = {entry["id"]: entry for entry in client.get("/v1/models").json()["data"]}
        assert [(name, entry["parent"]) for name, entry in models.items()] == [
            ("tiny", None),
            ("polite", "tiny"),
            ("rude", "tiny"),
        ]
        for name, folder in {"tiny": None, **folders}.items():
            expected = greedy(tiny, folder, b"Once upon", 8)
            for _ in range(2):  # the second time from the cache, which tells adapters apart
                result = client.post("/v1/completions", json={**body, "model": name}).json()
                assert result["model"] == name
                tokens = result["choices"][0]["logprobs"]["tokens"]
                known = [(i, token) for i, token in zip(expected, tokens, strict=False) if i < 128]
                assert [chr(i) for i, _ in known] == [token for _, token in known]
                assert len(tokens) == len(expected) or 256 in expected
            if folder is not None:
                ours = client.post(
                    "/generate", json={"prompt": "Once upon", "max_new_tokens": 8, "adapter": name}
                ).json()
                assert ours["text"] == result["choices"][0]["text"]
        for name, folder in {"tiny": None, **folders}.items():
            hidden, logprob = read(tiny, folder, b"Once upon")
            result = client.post("/v1/embeddings", json={"input": list(b"Once upon"), "model": name}).json()
            assert result["model"] == name
            assert result["data"][0]["embedding"] == pytest.approx(hidden.tolist(), abs=1e-5)
            scored = client.post("/score", json={"prompt": "Once", "text": " upon", "model": name}).json()
            assert scored["model"] == name
            assert scored["scores"][0]["score"] == pytest.approx(logprob, abs=1e-3)
        # outside of passes the model is the base
        adapters = service.engine.adapters.adapters
        assert {(adapter.weight, adapter.rows) for adapter in adapters.values()} == {(0.0, None)}
        reply = client.post("/score", json={"text": "x", "model": "kind"})
        assert (reply.status_code, reply.json()["error"]["param"]) == (404, "model")
