"""The scripts in examples/ run as they stand there, and a page of the documentation shows each of them."""

import runpy
from contextlib import suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with suppress(SystemExit):  # an example that needs a GPU says so and ends
        runpy.run_path(str(example), run_name="__main__")


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_is_shown_by_a_page(example: Path) -> None:
    pages = [page.read_text() for page in (ROOT / "docs").rglob("*.md")]
    assert any(f"examples/{example.name}" in page for page in pages)
