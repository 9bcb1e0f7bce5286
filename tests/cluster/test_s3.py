"""A run with data and copy in S3, as moto serves it; skipped where moto's server or s3fs is not installed."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.cluster.slurm import free_ports
from tests.conftest import TINY
from tests.strategies.processes import MODEL, assert_equal_to_the_last_bit, write_documents

NEEDED = ("moto", "flask", "s3fs", "boto3")
MISSING = [name for name in NEEDED if find_spec(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"{MISSING} not installed: pip install 'moto[s3,server]' s3fs"),
]
KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """A client of an S3 server with the documents of the test."""
    import boto3
    from moto.server import ThreadedMotoServer

    write_documents(tmp_path)
    server = ThreadedMotoServer(port=free_ports(1)[0], verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    for name, value in {**KEYS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    client.create_bucket(Bucket="bucket")
    client.put_object(Bucket="bucket", Key="texts/a.jsonl", Body=(tmp_path / "documents.jsonl").read_bytes())
    yield client
    server.stop()


def objects(client: object, prefix: str) -> dict[str, int]:
    """Sizes of the objects below a prefix."""
    found = client.list_objects_v2(Bucket="bucket", Prefix=prefix).get("Contents", [])
    return {item["Key"].removeprefix(prefix): item["Size"] for item in found}


def test_a_run_saves_to_s3_resumes_from_it_and_streams_from_it(command, bucket: object, tmp_path: Path) -> None:
    options = (*TINY, "trainer.max_steps=8", "callbacks.checkpoint.every_n_steps=2", "model.dropout=0.1", "logger=csv")
    stream, local = ("data.streaming=true", "data.workers=1"), "data.path=documents.jsonl"
    remote, copy = "data.path=s3://bucket/texts", "callbacks.checkpoint.dirpath=s3://bucket/run"
    assert command("train", *options, *stream, local, "output_dir=local").status == 0
    # streamed from S3 it is the run on the local file, and its copy is complete
    done = command("train", *options, *stream, remote, copy, "output_dir=first")
    assert done.status == 0, done.err
    assert_equal_to_the_last_bit(tmp_path / "first", tmp_path / "local", MODEL)
    copied = objects(bucket, "run/")
    names = [f"checkpoints/step=00000{step}.ckpt" for step in (6, 8)]
    assert [name for name in copied if name.startswith("checkpoints/")] == names
    for name in (*names, "model/model.safetensors", ".hydra/overrides.yaml", "metrics.csv", "results.json"):
        assert copied[name] == (tmp_path / "first" / name).stat().st_size
    # as if its machine had been lost after step 6
    bucket.delete_object(Bucket="bucket", Key=f"run/{names[1]}")
    again = command("train", "resume=s3://bucket/run", "output_dir=second", remote)
    assert "resuming    second/checkpoints/step=000006.ckpt" in again.out, again.err
    assert_equal_to_the_last_bit(tmp_path / "second", tmp_path / "local", MODEL)
    assert objects(bucket, "run/")[names[1]]
    # its model; the server writes its log into the same output
    prompt = ("prompt=to", "generation=greedy", "generation.max_new_tokens=8")
    written = command("generate", "checkpoint=s3://bucket/run", *prompt)
    assert written.out.splitlines()[-1] == command("generate", "checkpoint=local", *prompt).out.strip()
