"""The README is short, its links exist, and its programs and those of the how-to pages run as they stand there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs/how-to").glob("*.md"))]
PROGRAMS = {
    f"{page.stem}-{number}": program
    for page in PAGES
    for number, program in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE))
}


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_program_runs(program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(program, "a page", "exec"), {})


def test_commands_set_up_a_bare_machine() -> None:
    commands = [line for line in README.splitlines() if line.startswith("python3 -m venv .venv &&")]
    assert [c.rsplit("/", 1)[1] for c in commands] == ["exssnet train", "python -m pytest"]


def test_readme_has_at_most_160_lines() -> None:
    assert len(README.splitlines()) <= 160


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"])
def test_every_file_that_a_page_links_to_exists(page: str) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / page).read_text())
    assert [link for link in links if not (ROOT / link).exists()] == []


@pytest.mark.parametrize("page", ["docs/promises.md", "SECURITY.md"])
def test_every_test_that_a_promise_names_exists(page: str) -> None:
    tests = Path(__file__).parent
    named = set(re.findall(r"`(test_\w+)`", (tests.parent / page).read_text()))
    defined = {
        name
        for file in tests.rglob("test_*.py")
        for name in re.findall(r"^ *(?:def )?(test_\w+)(?:\(| = )", file.read_text(), re.M)
    }
    assert len(named) > 10
    assert named - defined == set()
