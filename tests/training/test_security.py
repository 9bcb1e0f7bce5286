"""What somebody else made runs nothing: run folders, sweeps, checkpoints, model folders; and secrets are kept nowhere."""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from omegaconf import OmegaConf

from genai_pl.config.redaction import contains_secret, redact
from genai_pl.errors import ConfigError, UserError
from genai_pl.plugins import import_plugins
from genai_pl.training.resume import replay
from genai_pl.training.targets import instantiate, locate_target
from genai_pl.training.trust import read_overrides, untrusted_overrides
from tests.conftest import ROOT, TINY, some

# writes a file that shows that it ran: when it is imported, called, or made
EVIL = """
from pathlib import Path
import lightning
Path("ran").touch()
def f(*args, **kwargs):
    Path("ran").touch()
    return [0.0] * 100
class Callback(lightning.Callback):
    pass
"""
CODE = [
    "+callbacks.extra.x._target_=evil.Callback",
    "callbacks.extra.x._target_=evil.Callback",
    "callbacks.extra={x:{_target_:evil.f}}",
    "callbacks.extra.ema._target_=evil.f",
    "callbacks.extra.ema={_target_:evil.f}",
    "callbacks.extra.ema.decay={_target_:evil.f}",
    "callbacks.extra.other.decay=0.5",
    "++callbacks.extra={x:{_target_:evil.f}}",
    "callbacks={extra:{x:{_target_:evil.f}}}",
    "optimizer._target_=evil.f",
    "optimizer={_target_:evil.f}",
    "scheduler._target_=evil.f",
    "objective._target_=evil.f",
    "data._target_=evil.f",
    "peft._target_=evil.f",
    "+strategy._target_=evil.f",
    "strategy.lightning={_target_:evil.f}",
    "logger=[{_target_:evil.f}]",
    "logger.0._target_=evil.f",
    "+trainer.plugins=[{_target_:evil.f}]",
    "+trainer.profiler._target_=evil.f",
    "model._target_=evil.f",
    "peft.rank_pattern={q_proj:{_target_:evil.f}}",
    "objective.reward=evil:f",
    "objective.reward='evil:f'",
    "objective.reward=[evil:f]",
    "objective.reward=[a_model,'evil:f']",
    "objective.judge=evil:f",
]
PLACES = [
    "hydra.searchpath=[file:///tmp/evil]",
    "hydra.searchpath=[pkg://evil]",
    "+hydra.searchpath=['file://evil']",
    "hydra.job.env_set.LD_PRELOAD=evil.so",
    "hydra.job.env_set={GENAI_PL_IMPORT:evil}",
    "hydra.job.env_copy=[HOME]",
    "hydra.job.config.override_dirname.item_sep=x",
    "hydra.output_subdir=../../elsewhere",
    "hydra.job_logging.handlers.file.filename=/tmp/elsewhere",
    "hydra/job_logging=evil",
    "hydra/callbacks=evil",
    "hydra.callbacks.x._target_=evil.f",
    "hydra.launcher._target_=evil.f",
    "hydra.launcher.setup=['touch ran']",
    "hydra.launcher.python=evil",
    "hydra.sweeper._target_=evil.f",
    "hydra.sweep.subdir=../../elsewhere",
    "logger.0.path=elsewhere.csv",
    "logger.1.save_dir=elsewhere",
    "+trainer.default_root_dir=elsewhere",
    "optimizer=evil",
    "optimizer=../../evil",
    "optimizer=/tmp/evil",
    "optimizer=[adamw]",
    "optimizer=glob(*)",
    "+experiment=evil",
    "experiment=evil",
    "experiment@_global_=evil",
    "optimizer@evil=adamw",
    "model=gpt_nano,../evil",
    "~optimizer",
    "seed=${oc.env:HOME}",
    "data.path=${oc.env:SECRET}",
    "data.path=${oc.decode:${oc.env:SECRET}}",
    "init_from=${hydra:runtime.cwd}",
    "data.path='x ${oc.env:HOME}'",
    "data.path=https://evil.example/data.jsonl",
    "init_from=s3://evil/model",
    "data.path=https://user:pass-of-mine@example.com/x",
    "+logger.1.api_key=key-of-mine",
    "nonsense=1",
    "a=b=[",
    "no override",
    "=",
    "seed=" + "[" * 3000,
    "prompt=\x1b[31mred\nline",
]


def folder(run: Path, *overrides: object) -> Path:
    """A run folder as anybody can make one."""
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "last.ckpt").write_text("never read")
    (run / ".hydra").mkdir()
    (run / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(list(overrides)))
    return run


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with code and options of somebody else, which nothing may run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.py").write_text(EVIL)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("SECRET", "secret-of-mine")
    return tmp_path


def refused(result, place: Path) -> str:
    assert result.status in (1, 2), result
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
    assert not any(c in result.err for c in ("Traceback", "\x1b"))
    assert not (place / "ran").exists()
    assert "evil" not in sys.modules
    for secret in ("secret-of-mine", "pass-of-mine", "key-of-mine"):
        assert secret not in result.err + result.out
    return result.err


@pytest.mark.parametrize("override", CODE + PLACES)
def test_what_a_run_folder_names_beside_plain_options_must_be_typed_again(override: str, place: Path, command) -> None:
    run = folder(place / "run", "model.n_layer=1", override)
    before = sorted(path for path in place.rglob("*") if path.name != "__pycache__")
    error = refused(command("train", "resume=run"), place)
    assert "overrides.yaml" in error
    assert "model.n_layer" not in error
    if override in CODE:
        assert "names code to run" in error
        assert "typed again on the command line" in error
    assert sorted(path for path in place.rglob("*") if path.name != "__pycache__") == before
    with pytest.raises(UserError, match=re.escape(str(run.relative_to(place)))):
        replay([f"resume={run.relative_to(place)}/checkpoints/last.ckpt"])


@pytest.mark.parametrize("override", ["+callbacks.extra.x._target_=evil.Callback", "hydra.searchpath=[pkg://evil]"])
def test_a_sweep_folder_is_trusted_as_little(override: str, place: Path, command) -> None:
    for kind in ("task", "hydra"):
        (place / "multirun" / kind).mkdir(parents=True)
        contents = {"hydra": {"overrides": {"task": ["seed=1,2"], "hydra": [], kind: [override]}}}
        (place / "multirun" / kind / "multirun.yaml").write_text(yaml.safe_dump(contents))
        refused(command("train", "-m", "resume=auto"), place)
        shutil.rmtree(place / "multirun")


@pytest.mark.parametrize(
    "option",
    [
        *("seed=3", "model.n_layer=2", "optimizer=adamw", "optimizer.betas=[0.9,0.95]", "data.path=texts/*.txt"),
        *("data.path='a b.txt'", "objective=grpo", "objective.reward=runs/judge", "experiment=smoke", "logger=[]"),
        *(
            "callbacks.samples.prompts=['To be: or']",
            "callbacks.extra.ema.decay=0.5",
            "peft.rank_pattern={q_proj:4}",
            "init_from=owner/name",
        ),
        *("callbacks.checkpoint.every_n_steps=5", "generation.regex='a{2}'", "trainer.max_epochs=null", "logger=csv"),
    ],
)
def test_plain_options_of_a_run_folder_count(option: str, place: Path) -> None:
    folder(place / "run", option)
    assert option in replay(["resume=run"])


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("eval.execute_code=true", "lets programs of a model run"),
        ("eval.execute_code=false", None),
        ("eval.tasks.a={path: x.jsonl, score: 'evil:f'}", "names code to run"),
        ("eval.tasks.a={path: x.jsonl, score: 'folder/evil.py:f'}", "names code to run"),
        ("eval.tasks.a={path: x.jsonl, judge: 'https://evil.example'}", "is a network address"),
        ("eval.tasks.a={path: x.jsonl, stop: ['Question:'], k: [1, 10]}", None),
        ("objective.reward=folder/evil.py:f", "names code to run"),
        ("objective.reward=evil.f", "names code to run"),
        ("objective.reward=[judge,subprocess.call]", "names code to run"),
    ],
)
def test_functions_and_programs_of_a_run_folder_must_be_typed_again(override: str, reason: str | None, place) -> None:
    assert untrusted_overrides([override], []) == ({} if reason is None else {override: reason})


def test_what_is_typed_again_counts(place: Path) -> None:
    folder(place / "run", "objective=grpo", "objective.reward=evil:f", "+callbacks.extra.x._target_=evil.Callback")
    typed = ["objective.reward=mine:f", "+callbacks.extra.x._target_=mine.Callback", "resume=run"]
    assert [a for a in replay(typed) if "evil" in a] == []
    assert set(typed) <= set(replay(typed))


def test_options_of_ones_own_count_where_their_folder_is_typed(place: Path) -> None:
    (place / "mine" / "optimizer").mkdir(parents=True)
    (place / "mine" / "optimizer" / "lion.yaml").touch()
    folder(place / "run", "optimizer=lion")
    with pytest.raises(UserError, match="optimizer=lion is not an option of ours"):
        replay(["resume=run"])
    for typed in (["--config-dir", "mine"], ["--config-dir=mine"], [f"hydra.searchpath=['file://{place}/mine']"]):
        assert "optimizer=lion" in replay([*typed, "resume=run"])


def bomb() -> str:
    """A list whose parts refer to each other: 10^9 items, in a few lines."""
    lines = ["- &a0 [x]", *(f"- &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10))]
    return "\n".join(lines)


@pytest.mark.parametrize(
    "contents",
    [
        bomb(),
        "[" * 50_000,
        "- " * 50_000,
        "\x00\xff",
        "- {a: b}",
        "a: b",
        "- 1",
        "- [",
        "!!python/object:evil.f {}",
        "x: " + "9" * 10_000,
        "- 2026-99-99",
        "- 'x" * 200_000,
        "- a=b\n" * 1000,
    ],
    ids=range(13),
)
@pytest.mark.parametrize("name", ["run/.hydra/overrides.yaml", "multirun/a/multirun.yaml"])
def test_a_file_that_is_no_list_of_overrides_is_one_line(name: str, contents: str, place: Path, command) -> None:
    folder(place / "run")
    (place / name).parent.mkdir(parents=True, exist_ok=True)
    (place / name).write_text(contents)
    arguments = ("resume=run",) if name.startswith("run") else ("-m", "resume=auto")
    assert name in refused(command("train", *arguments), place)


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "secret", "nowhere"])
def test_a_settings_file_that_is_none_is_neither_waited_for_nor_quoted(kind: str, place: Path, command) -> None:
    path = folder(place / "run") / ".hydra" / "overrides.yaml"
    path.unlink()
    (place / "secret").write_text("password: secret-of-mine\nbroken: [")
    {
        "pipe": lambda: os.mkfifo(path),
        "folder": path.mkdir,
        "device": lambda: path.symlink_to("/dev/zero"),
        "secret": lambda: path.symlink_to(place / "secret"),
        "nowhere": lambda: path.symlink_to(place / "nowhere"),
    }[kind]()
    assert "overrides.yaml" in refused(command("train", "resume=run"), place)
    if kind != "nowhere":
        with pytest.raises(UserError, match="cannot be read"):
            read_overrides(path)


@pytest.mark.parametrize("name", ["train.log", "metrics.csv", ".hydra", "checkpoints/step=000001.ckpt", "model"])
def test_a_run_folder_with_links_to_elsewhere_is_not_written_into(name: str, place: Path, command) -> None:
    run = folder(place / "run")
    (place / "elsewhere").mkdir()
    (place / "elsewhere" / "overrides.yaml").write_text("[]")
    shutil.rmtree(run / name, ignore_errors=True)
    (run / name).symlink_to(place / "elsewhere")
    assert f"run/{name}: a link out of the run folder" in refused(command("train", "resume=run"), place)
    assert [path.name for path in (place / "elsewhere").iterdir()] == ["overrides.yaml"]


@pytest.mark.parametrize(
    "contents",
    some(
        [
            *(
                {"genai_pl": 1},
                {"genai_pl": {}},
                {"genai_pl": {}, "state_dict": []},
                [1],
                {"genai_pl": [], "state_dict": {}},
            ),
            {"genai_pl": {"model": "x"}, "state_dict": {}},
            {"genai_pl": {"model": {"n_layer": 10**9}, "tokenizer": {}}, "state_dict": {}},
            {"genai_pl": {"model": {"n_layer": "x"}, "tokenizer": {}}, "state_dict": {}},
            {"genai_pl": {"model": {"vocab_size": 10**15, "n_embd": 10**9}, "tokenizer": {}}, "state_dict": {}},
            {"genai_pl": {"model": {"wrapped": {"model_type": "evil"}}, "tokenizer": {}}, "state_dict": {}},
            {"genai_pl": {"model": {}, "tokenizer": {"../../ran": "x"}}, "state_dict": {}},
            {"genai_pl": {"model": {}, "base": "run/bad.ckpt", "tokenizer": {}}, "state_dict": {}},
            {"genai_pl": {"model": {}, "base": "nowhere", "tokenizer": {}}, "state_dict": {}},
            {"genai_pl": {"model": {}, "peft": {"method": "evil.f", "options": {}}}, "state_dict": {}},
            {"genai_pl": {"model": {}}, "state_dict": {}, "global_step": "x"},
            {"genai_pl": {"model": {}}, "state_dict": {}, "hyper_parameters": {"x": [{"_target_": "evil.f"}]}},
        ]
    ),
)
def test_a_checkpoint_of_any_contents_is_refused_in_one_line(contents: object, place: Path, command) -> None:
    run = folder(place / "run", *TINY)
    torch.save(contents, run / "bad.ckpt")
    error = refused(command("generate", "checkpoint=run/bad.ckpt", "prompt=x"), place)
    assert "bad.ckpt" in error or "nowhere" in error
    torch.save(contents, run / "checkpoints" / "last.ckpt")
    refused(command("train", "resume=run"), place)


def test_a_model_folder_with_python_files_is_read_without_them(place: Path, command) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from genai_pl.data import byte_tokenizer

    tokenizer = byte_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained("theirs")
    tokenizer.save_pretrained("theirs")
    for name, values in {
        "config.json": {"auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}},
        "tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}, "tokenizer_class": "Evil"},
    }.items():
        path = place / "theirs" / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
        (place / "theirs" / "evil.py").write_text(EVIL)
    for checkpoint in ("theirs", "other"):
        command("generate", f"checkpoint={checkpoint}", "prompt=x", "generation.max_new_tokens=1")
        result = command("train", *TINY[3:], "model=hf", f"model.name={checkpoint}", "hydra.run.dir=run")
        assert "Traceback" not in result.err
        assert not (place / "ran").exists()
        shutil.rmtree(place / "run", ignore_errors=True)
        shutil.copytree("theirs", "other", dirs_exist_ok=True)
        path = place / "other" / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "evil"}))


def test_an_adapter_that_names_itself_as_its_base_is_one_line(place: Path, command) -> None:
    (place / "adapter").mkdir()
    (place / "adapter" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "adapter"}))
    assert "adapter" in refused(command("generate", "checkpoint=adapter", "prompt=x"), place)


@pytest.mark.parametrize("contents", ["[]", "1", '{"step": "x"}', '{"step": null}', "[" * 9999, "{", "{}"])
def test_results_of_somebody_else_do_not_end_a_run(contents: str, place: Path) -> None:
    from genai_pl.training.sweeps import read_results

    (place / "results.json").write_text(contents)
    assert read_results(place, 1) is None


@pytest.mark.parametrize("rows", ["a,b\n1,2\n", "step,val/loss\nx,1.0\n", "\0\n", 'step,val/loss\n"' + "x" * 200_000])
def test_tables_of_somebody_else_are_compared_or_refused(rows: str, place: Path, monkeypatch, capsys) -> None:
    from genai_pl.cli.compare import main

    (folder(place / "run", "\x1b[31m=x") / "metrics.csv").write_text(rows)
    monkeypatch.setattr(sys, "argv", ["compare.py", "run", "--no-picture"])
    with pytest.raises(SystemExit):
        main()
    err = capsys.readouterr().err
    assert (err.startswith("error: "), err.count("\n")) == (True, 1)


@pytest.mark.parametrize(
    "target",
    [
        *("os.system", "builtins.eval", "subprocess.run", "functools.partial", "hydra.utils.instantiate", "evil.f"),
        *("torch.os.system", "genai_pl.atomic_io.os.system", "genai_pl.training.targets.importlib.import_module"),
        *("torch.hub.load", "torch.load", "torch.utils.cpp_extension.load_inline", "torch.ops.load_library"),
        *("lightning.os.system", "genai_pl.nowhere.f", "torch..load", "", "evil"),
    ],
)
def test_only_named_packages_are_made_of_a_configuration(target: str, place: Path) -> None:
    import_plugins()
    for node in ({"_target_": target}, {"_target_": "torch.nn.Identity", "x": [{"y": {"_target_": target}}]}):
        with pytest.raises(ConfigError, match="_target_="):
            instantiate(OmegaConf.create(node))
    assert not (place / "ran").exists()


def test_our_options_and_those_of_lightning_and_torch_are_made() -> None:
    for path in (ROOT / "conf").rglob("*.yaml"):
        for target in re.findall(r"^[- ]*_target_: ([\w.]+)$", path.read_text(), re.M):
            assert target == "null" or target.endswith("WandbLogger") or callable(locate_target(target))
    assert isinstance(instantiate(OmegaConf.create({"_target_": "torch.nn.Identity"})), torch.nn.Identity)


def test_code_that_is_typed_runs(place: Path, command) -> None:
    result = command("train", *TINY, "+callbacks.extra.x._target_=evil.Callback", "hydra.run.dir=run")
    assert result.status == 0, result.err
    assert (place / "ran").exists()
    sys.modules.pop("evil")


def test_the_working_folder_is_no_place_for_modules_unless_it_is_named(place: Path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(place))])
    import_plugins()
    assert str(place) not in sys.path
    import_plugins(named=True)
    assert sys.path[-1] == str(place)


SECRETS = [
    *("data.path=https://me:pass-of-mine@host/x.jsonl", "data.path='s3://b/x?X-Amz-Signature=key-of-mine'"),
    *("+logger.1.api_key=key-of-mine", "hydra.job.env_set.WANDB_API_KEY=key-of-mine", "+trainer.token=key-of-mine"),
    *("init_from=hf_abcdefghijklmnopqrstuv", "run_name=sk-abcdefghijklmnopqrstuv"),
]


@pytest.mark.parametrize("argument", SECRETS)
def test_a_secret_on_the_command_line_of_a_training_is_refused_unseen(argument: str, place: Path, command) -> None:
    error = refused(command("train", *TINY, argument), place)
    assert "${oc.env:NAME}" in error
    assert not any(word in error for word in ("abcdefgh", "of-mine"))
    assert not (place / "outputs").exists()


def test_options_are_not_taken_for_secrets() -> None:
    texts = [path.read_text() for path in (ROOT / "conf").rglob("*.yaml")]
    names = {f"{key}=3" for text in texts for key in re.findall(r"^ *(\w+):", text, re.M)}
    assert not [option for option in names if contains_secret(option)]
    assert not contains_secret("+logger.1.api_key=${oc.env:WANDB_API_KEY}")
    assert redact("http://host:8000/v1?n=3 a:b@c") == "http://host:8000/v1?n=3 a:b@c"
    assert redact("redis://:pass@host:1/0 https://me:pass@host") == "redis://***@host:1/0 https://***@host"


def test_what_the_environment_gives_stands_in_no_output_and_no_file(place: Path, command, monkeypatch) -> None:
    shutil.copy(next((ROOT / "genai_pl" / "data" / "corpus").rglob("*.txt")), place / "secret-of-mine.txt")
    monkeypatch.setenv("PLACE", "secret-of-mine.txt")
    result = command("train", *TINY, "data.path='${oc.env:PLACE}'", "hydra.run.dir=run", "trainer.max_steps=2")
    assert result.status == 0, result.err
    assert "secret-of-mine" not in result.out + result.err
    for path in (place / "run").rglob("*"):
        assert not path.is_file() or b"secret-of-mine" not in path.read_bytes(), path
    assert "${oc.env:PLACE}" in (place / "run" / "model" / "README.md").read_text()
    monkeypatch.setenv("PLACE", "secret-of-mine-too.txt")
    result = command("train", *TINY, "data.path='${oc.env:PLACE}'")
    assert result.status == 1
    assert "secret-of-mine" not in result.err


def test_the_locked_set_is_the_tested_one_with_hashes() -> None:
    def pins(text: str) -> dict[str, str]:
        return {name.lower().replace("_", "-"): v for name, v in re.findall(r"^([\w.-]+)==([\w.]+)", text, re.M)}

    locked = (ROOT / "requirements.lock").read_text()
    tested, entries = pins((ROOT / "constraints.txt").read_text()), re.split(r"^(?=[\w-]+==)", locked, flags=re.M)[1:]
    assert all("--hash=sha256:" in entry for entry in entries)
    differing = {name for name, version in pins(locked).items() if tested.get(name, version) != version}
    assert differing <= {"triton"}  # which PyPI's torch pins
    project = (ROOT / "pyproject.toml").read_text()
    assert '"lightning>=2.6.6,' in project
    assert '"hydra-core>=1.3.8,' in project
    for name in ("torch", "lightning", "hydra-core", "omegaconf", "transformers", "safetensors", "tokenizers"):
        assert name in pins(locked)
