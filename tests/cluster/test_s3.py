"""A run with data and copy in S3, as moto serves it; skipped where moto's server or s3fs is not installed."""

import subprocess
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.cluster.runs import PLAIN, TRAIN, prepare, run
from tests.cluster.slurm import free_ports
from tests.conftest import TINY
from tests.strategies.processes import MODEL, assert_equal_to_the_last_bit

NEEDED = ("moto", "flask", "s3fs", "boto3")
MISSING = [name for name in NEEDED if find_spec(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"{MISSING} not installed: pip install 'moto[s3,server]' s3fs"),
]
KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


@pytest.fixture
def bucket(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """A client of an S3 server with the documents of the test."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=free_ports(1)[0], verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    for name, value in {**KEYS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}.items():
        monkeypatch.setitem(PLAIN, name, value)
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    client.create_bucket(Bucket="bucket")
    client.put_object(Bucket="bucket", Key="texts/a.jsonl", Body=(folder / "documents.jsonl").read_bytes())
    yield client
    server.stop()


def objects(client: object, prefix: str) -> dict[str, int]:
    """Sizes of the objects below a prefix."""
    found = client.list_objects_v2(Bucket="bucket", Prefix=prefix).get("Contents", [])
    return {item["Key"].removeprefix(prefix): item["Size"] for item in found}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return prepare(tmp_path)


def test_a_run_saves_to_s3_resumes_from_it_and_streams_from_it(folder: Path, bucket: object) -> None:
    options = (*TINY, "trainer.max_steps=8", "callbacks.checkpoint.every_n_steps=2", "model.dropout=0.1", "logger=csv")
    stream, local = ("data.streaming=true", "data.workers=1"), "data.path=documents.jsonl"
    remote, copy = "data.path=s3://bucket/texts", "callbacks.checkpoint.dirpath=s3://bucket/run"
    train = TRAIN
    run(folder, *train, *options, *stream, local, "output_dir=local")
    # streamed from S3 it is the run on the local file, and its copy is complete
    run(folder, *train, *options, *stream, remote, copy, "output_dir=first")
    assert_equal_to_the_last_bit(folder / "first", folder / "local", MODEL)
    copied = objects(bucket, "run/")
    names = [f"checkpoints/step=00000{step}.ckpt" for step in (6, 8)]
    assert [name for name in copied if name.startswith("checkpoints/")] == names
    for name in (*names, "model/model.safetensors", ".hydra/overrides.yaml", "metrics.csv", "results.json"):
        assert copied[name] == (folder / "first" / name).stat().st_size
    # as if its machine had been lost after step 6
    bucket.delete_object(Bucket="bucket", Key=f"run/{names[1]}")
    out = run(folder, *train, "resume=s3://bucket/run", "output_dir=second", remote)
    assert "resuming    second/checkpoints/step=000006.ckpt" in out
    assert_equal_to_the_last_bit(folder / "second", folder / "local", MODEL)
    assert objects(bucket, "run/")[names[1]]
    # shards, and a model that starts from the copy
    sharded = ("trainer=fsdp", "trainer.devices=2", "trainer.accelerator=cpu", "strategy.sharded_checkpoints=true")
    shards = "callbacks.checkpoint.dirpath=s3://bucket/shards"
    start = ("init_from=s3://bucket/run", remote, *sharded, shards, "optimizer=adamw", "output_dir=shards")
    run(folder, *train, *options[4:], *start, "data.batch_size=2")
    there = objects(bucket, "shards/checkpoints/step=000008.ckpt/")
    assert there.keys() == {path.name for path in (folder / "shards/checkpoints/step=000008.ckpt").iterdir()}
    for name in there:
        bucket.delete_object(Bucket="bucket", Key=f"shards/checkpoints/step=000008.ckpt/{name}")
    again = ("resume=s3://bucket/shards", "output_dir=again", "init_from=s3://bucket/run", remote)
    assert "resuming    again/checkpoints/step=000006.ckpt" in run(folder, *train, *again)
    assert_equal_to_the_last_bit(folder / "again", folder / "shards", MODEL)


def failing(folder: Path, *command: str) -> str:
    """What a command prints that must fail."""
    done = subprocess.run(command, cwd=folder, env=PLAIN, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode in (1, 2), done.stdout
    return done.stdout


def test_storage_that_refuses_is_one_line(folder: Path, bucket: object) -> None:
    command = (*TRAIN, *TINY, "data.path=documents.jsonl")
    for address, reason in {"s3://nowhere/run": "The specified bucket does not exist"}.items():
        done = failing(folder, *command, f"callbacks.checkpoint.dirpath={address}")
        assert f"error: callbacks.checkpoint.dirpath={address}: cannot be written, {reason}" in done
        assert "Traceback" not in done
    assert "error: data.path=s3://bucket/none: no such file or folder" in failing(
        folder, *command, "data.path=s3://bucket/none"
    )
