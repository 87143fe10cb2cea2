"""Values from outside: how messages show them, and YAML that is too large, too deep or too often repeated."""

import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from exssnet.io.values import YAML_BYTES, YAML_DEPTH, YAML_VALUES, fitting, from_yaml, read_yaml, shown, typed

SHORT: list[Any] = [
    None, True, 3, -2.5, "a", 'it\'s "x"', b"\0", "é", [], {}, (), set(), [1, "a", [None]], (1,), (1, 2), {3},
    {"a": [1.5, {"b": ()}], 2: "c"}, [[[[[[]]]]]], float("nan"),
]  # fmt: skip


@pytest.mark.parametrize("value", SHORT, ids=repr)
def test_a_short_value_is_shown_as_python_writes_it(value: Any) -> None:
    assert shown(value) == repr(value)


def test_what_is_long_is_cut() -> None:
    for value in ("x" * 1000, b"x" * 1000, list(range(1000)), {"x" * 1000: 1}, [["x"] * 99] * 99):
        assert shown(value) == repr(value)[:77] + "..."
        assert shown(value, 200) == repr(value)[:197] + "..."
    assert shown(10**5000) == "an integer of 16610 bits"  # Python refuses to write it


def repeated(levels: int) -> Any:
    """A small object that Python writes with 9 to the power of `levels` members."""
    value: Any = ["x"]
    for _ in range(levels):
        value = [value] * 9
    return value


def test_no_more_is_built_than_is_shown() -> None:
    itself: list[Any] = []
    itself.append(itself)
    tracemalloc.start()
    for value in (repeated(50), {"a": repeated(50)}, itself, "x" * 10_000_000):
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        assert len(shown(value)) == 80
        assert tracemalloc.get_traced_memory()[1] - before < 1_000_000
    tracemalloc.stop()


@pytest.mark.parametrize("value", ["\x1b[31m", "a\nb\rc", "\x07", "\u202e\u2028", "\ud800", "\x9b"], ids=ascii)
def test_nothing_that_moves_the_cursor_is_shown(value: str) -> None:
    told = (value, [value], {value: value}, Path(f"x{value}y"), ValueError(value), FileNotFoundError(2, "no", value))
    for thing in told:
        assert shown(thing).isprintable()


def test_paths_and_errors_are_shown_as_their_text() -> None:
    path = Path("a b") / ("c" * 200)
    assert shown(path) == str(path)
    assert shown(ValueError("one\n  two")) == "one two"
    assert shown(ValueError()) == "ValueError"
    assert shown(ValueError("x" * 99)) == "x" * 77 + "..."


BOMB = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefghi", "bcdefghij", strict=True)
)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (BOMB, f"it holds more than {YAML_VALUES} values, with those that aliases repeat"),
        (f"a: [{'1,' * YAML_VALUES}]", f"it holds more than {YAML_VALUES} values"),
        ("a: &a [1, *a]", "the alias 'a' stands for nothing that is finished before it"),
        ("a: *nothing", "the alias 'nothing' stands for nothing"),
        ("a: " + "[" * 9000, f"its values are nested deeper than {YAML_DEPTH} levels"),
        ("- " * 9000, f"its values are nested deeper than {YAML_DEPTH} levels"),
        ("a: " + "{b: " * 9000, f"its values are nested deeper than {YAML_DEPTH} levels"),
        ("a: " + "1" * YAML_BYTES, f"it is larger than {YAML_BYTES} bytes"),
        ("a: 2020-13-45", "month must be in 1..12"),
        ("a: " + "1" * 5000, "Exceeds the limit"),
        ("a: !!int ''", ""),
        ("a: !!timestamp x", ""),
        ("a: !!bool x", ""),
        ("a: !!python/object:os.system x", "could not determine a constructor"),
    ],
    ids=["anchors", "long", "itself", "no anchor", "lists", "block", "mappings", "large", "date", "number", "no number",
         "no date", "no switch", "object"],
)  # fmt: skip
def test_yaml_is_refused_in_one_sentence_that_names_the_file(tmp_path: Path, content: str, reason: str) -> None:
    file = tmp_path / "options.yaml"
    file.write_text(content)
    with pytest.raises(ValueError, match=f"options.yaml is not YAML: .*{reason}") as refusal:
        read_yaml(file)
    assert str(refusal.value).isprintable()


def test_yaml_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "options.yaml").write_bytes(b"a: \xff")
    with pytest.raises(ValueError, match=r"options\.yaml is not YAML: .*can't decode"):
        read_yaml(tmp_path / "options.yaml")


def test_aliases_and_nesting_that_are_sound_are_read() -> None:
    assert from_yaml("a: &x {p: 1, q: [2]}\nb: *x\nc: {<<: *x, p: 3}", "test") == {
        "a": {"p": 1, "q": [2]}, "b": {"p": 1, "q": [2]}, "c": {"p": 3, "q": [2]},
    }  # fmt: skip
    deep = YAML_DEPTH - 2
    assert from_yaml(f"a: {'[' * deep}{']' * deep}", "test")["a"]
    assert from_yaml("", "test") == {}


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        (float, "1e-2", 0.01), (float, 3, 3.0), (float | None, None, None), (int, 3, 3), (bool | str, "flip", "flip"),
        (int | tuple[int, ...] | None, [1, 2], (1, 2)), (int | tuple[int, ...], 5, 5), (bool | str | None, True, True),
        (tuple[str, ...], ["a"], ("a",)), (dict[str, Any], {"a": 1}, {"a": 1}),
    ],
)  # fmt: skip
def test_values_that_fit_are_taken(kind: Any, value: Any, expected: Any) -> None:
    found = fitting(kind, value)
    assert (found, type(found)) == (expected, type(expected))


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (int, True), (int, 1.0), (int, "1"), (int, 2**63), (float, 10**400), (float, True), (float, "x"), (float, [1]),
        (bool, 1), (str, 1), (int | None, "1"), (tuple[int, ...], 1), (tuple[int, ...], ["a"]), (dict[str, Any], [1]),
        (int | tuple[int, ...], [True]),
    ],
)  # fmt: skip
def test_values_that_do_not_fit_are_refused(kind: Any, value: Any) -> None:
    with pytest.raises(ValueError, match=" is no "):
        fitting(kind, value)


def test_names_in_a_refusal_are_cut_and_printable() -> None:
    with pytest.raises(ValueError, match="must be int") as refusal:
        typed(dict[str, int], {"\x1b[2J" + "x" * 1000: "y" * 1000}, "its notes")
    assert str(refusal.value).isprintable()
    assert len(str(refusal.value)) < 250


def test_integers_beyond_what_tensors_count_are_refused() -> None:
    assert typed(int, 1 << 62, "n") == 1 << 62
    for value in (1 + (1 << 62), -1 - (1 << 62)):
        with pytest.raises(ValueError, match=f"^n must be int, got {value}$"):
            typed(int, value, "n")
