"""Names of the zoo begin a step of private_vision's command: a handful here, all in `make zoo`."""

from __future__ import annotations

import pytest

pytest.importorskip("timm")

from benchmarks import zoo


def test_the_list_has_eighty_names() -> None:
    assert len(zoo.TIMM) == len(set(zoo.TIMM)) == 80


@pytest.mark.slow
@pytest.mark.zoo
@pytest.mark.parametrize("name", ["resnet18", "deit_tiny_patch16_224", "convit_tiny"])
def test_a_name_takes_a_step_of_the_command(name: str) -> None:
    assert name in zoo.TIMM
    assert ", step 1, epsilon " in zoo.step_by_command(name)


@pytest.mark.slow
def test_a_name_that_fails_is_said_and_fails_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(zoo, "TIMM", ["resnet_18"])
    assert zoo.main(["--command"]) == 1
    said = capsys.readouterr().out
    assert "resnet_18: FAILED" in said
    assert "Did you mean 'resnet18'" in said.replace("\n", " ")
    assert said.endswith("1 failed: resnet_18\n")
