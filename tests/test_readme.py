"""The README's programs run as they stand there."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()
PROGRAMS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("program", PROGRAMS, ids=range(len(PROGRAMS)))
def test_program_runs(program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(program, "README.md", "exec"), {})


def test_commands_set_up_a_bare_machine() -> None:
    commands = [line for line in README.splitlines() if line.startswith("python3 -m venv .venv &&")]
    assert [c.rsplit("/", 1)[1] for c in commands] == ["exssnet train", "python -m pytest"]


@pytest.mark.parametrize("page", ["docs/promises.md", "SECURITY.md"])
def test_every_test_that_a_promise_names_exists(page: str) -> None:
    tests = Path(__file__).parent
    named = set(re.findall(r"`(test_\w+)`", (tests.parent / page).read_text()))
    defined = {
        name for file in tests.rglob("test_*.py") for name in re.findall(r"^def (test_\w+)", file.read_text(), re.M)
    }
    assert len(named) > 10
    assert named - defined == set()
