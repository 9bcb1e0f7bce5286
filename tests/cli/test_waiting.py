"""How threads of a command wait for each other, unless the user has said it."""

import os

import pytest

from genai_pl.cli.command import wait_briefly


@pytest.mark.parametrize("own", [{"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "7"}, {}])
def test_the_users_variables_stay(monkeypatch: pytest.MonkeyPatch, own: dict[str, str]) -> None:
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "environ", dict(os.environ))  # what is set here must not outlive the test
    wait_briefly()
    found = {name: os.environ[name] for name in names if name in os.environ}
    assert found == (own or {"GOMP_SPINCOUNT": "1000", "OMP_WAIT_POLICY": "PASSIVE"})
