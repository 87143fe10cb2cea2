"""`exssnet train` killed at any moment and resumed ends as the run that was never killed; signals and refusals.

EXSSNET_KILLS sets how often the run is killed.
"""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from learning import acting

import exssnet
from exssnet import checkpoint
from exssnet.cli import saving, terminal
from exssnet.cli.commands import main
from exssnet.continual.learner import Learner
from exssnet.io import container

pytest.importorskip("sklearn", reason="the runs here learn scikit-learn's digits")

KILLS = int(os.environ.get("EXSSNET_KILLS", "4"))
EPOCHS, WEIGHT_EPOCHS, BATCHES = 4, 4, 6
RUN = ["train", "--data", "digits", "--tasks", "2", "--epochs", str(EPOCHS), "--weight-epochs", str(WEIGHT_EPOCHS)]
RUN += ["--batch-size", "128", "--threads", "1", "--patience", "3"]


SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]


@pytest.fixture(autouse=True)
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)


def results(out: Path) -> tuple[object, ...]:
    """All that a run leaves, except times and the folder's name: the model's file whole, and every number."""
    found = json.loads((out / "result.json").read_text())
    for task in found["tasks"]:
        del task["seconds"]
    epochs = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    numbers = [found[key] for key in ("model", "accuracy", "metrics", "tasks", "mask_bytes")]
    return numbers, [{**e, "seconds": 0} for e in epochs], (out / "model.safetensors").read_bytes()


def process(*arguments: str) -> "subprocess.Popen[str]":
    # Nothing of the tests' settings: what a user starts, without plots.
    program = "import sys; sys.modules['matplotlib'] = None; from exssnet.cli.commands import main; sys.exit(main())"
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[object, ...]:
    """The results of a run that nothing disturbs and that writes no checkpoint."""
    out = tmp_path_factory.mktemp("straight")
    with process(*RUN, "--every-minutes", "0", "--out", str(out)) as run:
        said, _ = run.communicate(timeout=120)
    assert run.returncode == 0, said
    assert not (out / "checkpoint.safetensors").exists()
    return results(out)


def position(path: Path) -> tuple[int, str]:
    """How many steps the run of a checkpoint has made, and the phase; -1 without any."""
    if not path.exists():
        return -1, ""
    meta = checkpoint.header(path)
    steps, at = meta.tasks * (EPOCHS + WEIGHT_EPOCHS) * BATCHES, meta.learner["open"]
    if at is None:
        return steps, "idle"
    return steps + (at["phase"] == "weight") * EPOCHS * BATCHES + at["epoch"] * BATCHES + at["batch"], at["phase"]


@pytest.mark.proof
def test_a_run_that_is_killed_again_and_again_ends_as_the_one_that_is_not(
    straight: tuple[object, ...], tmp_path: Path
) -> None:
    draw, path = random.Random(KILLS), tmp_path / "checkpoint.safetensors"
    targets = sorted(draw.choices(range(-1, 2 * (EPOCHS + WEIGHT_EPOCHS) * BATCHES), k=KILLS))
    kills: list[tuple[int, str]] = []
    for target in [*targets, 1 << 30]:
        again = (
            ["train", "--resume", str(tmp_path)] if path.exists() else [*RUN, "--every", "1", "--out", str(tmp_path)]
        )
        with process(*again) as run:
            began, before = time.monotonic(), position(path)[0]
            while run.poll() is None and (position(path)[0] < max(target, before + 1) or target < 0):
                time.sleep(0.01)
                if target < 0 and time.monotonic() - began > draw.uniform(0, 5):
                    break  # while the process starts, perhaps before there is any checkpoint
                assert time.monotonic() - began < 200
            time.sleep(draw.uniform(0, 0.02))
            run.kill()
            said, _ = run.communicate()
        assert run.returncode in (0, -signal.SIGKILL), said
        if run.returncode != 0:
            kills.append(position(path))
    print(f"killed {len(kills)} times, after steps and in phases {kills}")
    assert results(tmp_path) == straight
    assert not list(tmp_path.glob("*.part"))


def test_a_real_sigterm_saves_and_the_resumed_run_ends_as_the_straight_one(
    straight: tuple[object, ...], tmp_path: Path
) -> None:
    with process(*RUN, "--every-minutes", "0", "--out", str(tmp_path)) as run:
        assert run.stdout is not None
        run.stdout.readline()  # the first epoch is over
        run.terminate()
        said, _ = run.communicate(timeout=60)
    assert run.returncode == 128 + signal.SIGTERM
    last = said.splitlines()[-1]
    assert last.startswith("Stopped by SIGTERM in task 0, ")
    assert last.endswith(f"go on with: exssnet train --resume {tmp_path}")
    assert main(["train", "--resume", str(tmp_path)]) == 0
    assert results(tmp_path) == straight


@contextmanager
def stopping(number: int = signal.SIGINT, task: int = 1, phase: str = "weight") -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(terminal, "observer", acting(task, phase, 7, lambda: signal.raise_signal(number)))
        yield


@pytest.mark.parametrize(("task", "phase"), [(0, "mask"), (1, "weight")])
@pytest.mark.parametrize(("number", "status"), SIGNALS, ids=lambda value: getattr(value, "name", ""))
def test_a_signal_saves_says_how_to_go_on_and_leaves_the_handlers_as_they_were(
    straight: tuple[object, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str], number: signal.Signals,
    status: int, task: int, phase: str,
) -> None:  # fmt: skip
    before = signal.getsignal(number)
    with stopping(number, task, phase):
        assert main([*RUN, "--out", str(tmp_path)]) == status
    assert signal.getsignal(number) is before
    said = capsys.readouterr().out.splitlines()[-1]
    assert said == (
        f"Stopped by {number.name} in task {task}, {phase} phase, step 7 of 24; "
        f"go on with: exssnet train --resume {tmp_path}"
    )
    assert main(["train", "--resume", "--out", str(tmp_path)]) == 0
    assert f"after {task} of 2 tasks, in the {phase} phase of task {task}." in capsys.readouterr().out
    assert results(tmp_path) == straight


def test_an_ignored_hangup_stays_ignored(
    straight: tuple[object, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with stopping(signal.SIGHUP):
        status = main([*RUN, "--out", str(tmp_path)])
    assert signal.signal(signal.SIGHUP, before) is signal.SIG_IGN
    assert (status, "Stopped" in capsys.readouterr().out) == (0, False)
    assert results(tmp_path) == straight


def test_a_second_signal_acts_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(terminal, "observer", acting(0, "mask", 7, twice))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    assert main([*RUN, "--out", str(tmp_path)]) == 130
    signal.signal(signal.SIGINT, before)
    assert not (tmp_path / "checkpoint.safetensors").exists()


def test_a_finished_run_says_so_and_writes_its_results_again(
    straight: tuple[object, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*RUN, "--every", "1000", "--out", str(tmp_path)]) == 0
    (tmp_path / "result.json").unlink()
    capsys.readouterr()
    assert main(["train", "--resume", str(tmp_path / "checkpoint.safetensors")]) == 0
    assert "is finished: 2 of 2 tasks are learned; its results are written again." in capsys.readouterr().out
    assert results(tmp_path) == straight


def test_without_every_a_short_run_leaves_no_checkpoint(tmp_path: Path) -> None:
    assert main([*RUN, "--epochs", "1", "--out", str(tmp_path)]) == 0
    assert not (tmp_path / "checkpoint.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "writes"),
    [(["--every", "8"], 12), (["--every-minutes", "0"], 0), (["--every-minutes", "1e-9"], 96)],
    ids=["steps", "never", "always"],
)
def test_checkpoints_are_written_when_they_are_due(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], writes: int
) -> None:
    written: list[int] = []
    monkeypatch.setattr(saving.checkpoint, "save_run", lambda *_: written.append(1))
    assert main([*RUN, "--patience", "9", *arguments, "--out", str(tmp_path)]) == 0
    assert len(written) == writes + (arguments[0] == "--every")  # the last one says that the run is finished


def test_where_no_checkpoint_can_be_written_training_goes_on_and_says_so(
    straight: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving.checkpoint, "save_run", full)
    assert main([*RUN, "--every", "30", "--out", str(tmp_path)]) == 0
    assert results(tmp_path) == straight
    said = "exssnet: a checkpoint could not be saved, the file is whole: [Errno 28] No space left on device"
    assert capsys.readouterr().err.splitlines()[0] == said


# Refusals


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stopped")
    with stopping():
        assert main([*RUN, "--out", str(out)]) == 130
    return out


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(["train", *arguments]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err.splitlines()) == 1
    return said.err.removeprefix("exssnet: ").rstrip()


@pytest.mark.parametrize(
    ("option", "value", "had"),
    [
        ("--density", "0.2", "0.1"),
        ("--seed", "3", "0"),
        ("--method", "wsn", "exssnet"),
        ("--epochs", "9", "4"),
        ("--precision", "bf16", "fp32"),
    ],
)
def test_another_option_is_refused_by_name(
    stopped: Path, capsys: pytest.CaptureFixture[str], option: str, value: str, had: str
) -> None:
    path = stopped / "checkpoint.safetensors"
    assert refused(capsys, "--resume", str(stopped), option, value) == (
        f"{option} {value} is not what the run in {path} has ({had}): leave it out, a resumed run keeps its options"
    )


def test_the_same_options_and_harmless_ones_may_be_given(
    stopped: Path, straight: tuple[object, ...], tmp_path: Path
) -> None:
    given = [*RUN, "--resume", str(stopped), "--every", "50", "--every-minutes", "3", "--out", str(tmp_path)]
    assert main(given) == 0
    assert results(tmp_path) == straight
    assert checkpoint.header(tmp_path / "checkpoint.safetensors").tasks == 2


def test_threads_are_those_of_the_run_unless_they_are_given(stopped: Path, tmp_path: Path) -> None:
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Learner, "run", lambda learner, _: seen.append(torch.get_num_threads()) or learner.phases.abandon_task()
        )
        torch.set_num_threads(2)
        for given in ([], ["--threads", "2"]):
            assert main(["train", "--resume", str(stopped), *given, "--out", str(tmp_path)]) == 0
    assert seen == [1, 2]


def test_a_folder_without_a_checkpoint_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    said = f"there is no checkpoint {tmp_path / 'checkpoint.safetensors'}: a run writes one every 10 minutes"
    assert refused(capsys, "--resume", str(tmp_path)).startswith(said)
    assert refused(capsys, "--resume", "--out", str(tmp_path)).startswith(said)


def test_a_finished_model_is_no_run(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = stopped / "model.safetensors"
    assert refused(capsys, "--resume", str(path)) == (
        f"{path} is of no run of `exssnet train`: load it with exssnet.checkpoint"
    )


def test_a_new_run_does_not_write_over_one_that_could_go_on(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (stopped / "checkpoint.safetensors").read_bytes()
    said = refused(capsys, *RUN[1:], "--out", str(stopped))
    assert said.startswith(
        f"{stopped} holds a run that stopped after 1 of 2 tasks: go on with `exssnet train --resume "
    )
    assert (stopped / "checkpoint.safetensors").read_bytes() == before


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The checkpoint of a finished run with other options."""
    out = tmp_path_factory.mktemp("finished")
    assert main([*RUN, "--epochs", "1", "--weight-epochs", "1", "--every", "1000", "--out", str(out)]) == 0
    return (out / "checkpoint.safetensors").read_bytes()


@pytest.mark.parametrize(
    "wrong",
    [["--data", "none"], ["--density", "7"], ["--batch-size", "0"], ["--mask-lr", "-1"], ["--threads", "9999"]],
    ids=" ".join,
)
def test_a_new_run_that_is_refused_leaves_the_finished_checkpoint(
    finished: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str], wrong: list[str]
) -> None:
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(finished)
    refused(capsys, *RUN[1:], *wrong, "--out", str(tmp_path))
    assert path.read_bytes() == finished
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("restarts", ["0", "1"])
def test_a_new_run_replaces_the_finished_checkpoint_after_its_first_step(
    finished: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, restarts: str
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restarts)  # a worker may die before the first step
    path, seen = tmp_path / "checkpoint.safetensors", list[tuple[int, str]]()
    path.write_bytes(finished)
    monkeypatch.setattr(terminal, "observer", acting(0, "mask", 2, lambda: seen.append(position(path))))
    assert main([*RUN, "--every-minutes", "0", "--out", str(tmp_path)]) == 0
    assert seen == [(1, "mask")]
    assert checkpoint.header(path).tasks == 2


@pytest.mark.parametrize("name", ["checkpoint.safetensors", "model.safetensors"])
@pytest.mark.parametrize("content", ["text", "newer", "damaged"])
def test_a_file_of_our_name_that_is_not_ours_is_not_replaced(
    finished: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: str
) -> None:
    path = tmp_path / name
    newer = finished.replace(b'"exssnet-2"', b'"exssnet-3"')
    path.write_bytes({"text": b"mine", "newer": newer, "damaged": finished[:-1]}[content])
    before = path.read_bytes()
    said = refused(capsys, *RUN[1:], "--out", str(tmp_path))
    assert str(path) in said
    assert said.endswith("; a new run would replace it: give another --out, or move it away")
    assert path.read_bytes() == before


def test_a_finished_model_of_our_name_is_not_replaced_by_a_checkpoint(
    stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes((stopped / "model.safetensors").read_bytes())
    assert "is of no run of `exssnet train`, and a new run would replace it" in refused(
        capsys, *RUN[1:], "--out", str(tmp_path)
    )


def test_a_resumed_run_does_not_write_over_another_one(
    stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "checkpoint.safetensors").write_bytes((stopped / "checkpoint.safetensors").read_bytes())
    said = refused(capsys, "--resume", str(stopped), "--out", str(tmp_path))
    assert said.startswith(f"{tmp_path} holds a run that stopped after 1 of 2 tasks")


@pytest.mark.parametrize("second", [RUN[1:], ["--resume"]], ids=["train", "resume"])
def test_a_second_run_in_a_folder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], second: list[str]
) -> None:
    said: list[str] = []
    again = [*second, "--out", str(tmp_path)]
    monkeypatch.setattr(terminal, "observer", acting(0, "mask", 7, lambda: said.append(refused(capsys, *again))))
    assert main([*RUN, "--epochs", "2", "--weight-epochs", "1", "--every", "1", "--out", str(tmp_path)]) == 0
    assert len(said) == 1
    assert said[0].startswith(f"{tmp_path} is in use by process {os.getpid()} on ")
    assert not (tmp_path / "exssnet.lock").exists()


def forged(stopped: Path, folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """The checkpoint of a stopped run with another description and a checksum that fits."""
    with container.opened(stopped / "checkpoint.safetensors") as found:
        meta, tensors = json.loads(found.metadata["exssnet"]), found.tensors()
        change(meta)
        path = folder / "checkpoint.safetensors"
        container.write(path, tensors, found.metadata | {"exssnet": json.dumps(meta)})
    return path


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda meta: meta["notes"]["options"].update(stream="permuted", tasks=1 << 40), "it tells of 1099511627776 t"),
        (lambda meta: meta["notes"]["options"].update(threads=1 << 40), r"in \[1, 1024\], got 1099511627776"),
        (lambda meta: meta.update(tasks=1 << 40), "tells of 3 layers and 1099511627776 tasks, it holds 3 of their wei"),
        (lambda meta: meta.update(k=dict.fromkeys(meta["k"], 1 << 40)), "keep 1099511627776 of 19200 weights in "),
        (lambda meta: meta["k"].update({"\x1b[2J": 1}), "tells of 4 layers and 1 tasks, it holds 3 of their weights"),
        (lambda meta: meta["learner"]["choices"][0].update(layer="\x1b[2J" * 999), r"of kernels for \\x1b\[2J"),
        (lambda meta: meta["notes"]["options"].update(seed="\x1b[2J"), "seed must be int, got"),
        (lambda meta: meta["learner"].update(settings={"\x1b]0;": "\n\n"}), r"is of a learner with \\x1b\]0; "),
    ],
    ids=["tasks of the stream", "threads", "tasks", "k", "layers", "choice", "option", "setting"],
)
def test_a_forged_checkpoint_is_refused_in_a_short_printable_sentence(
    stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Callable[[Any], object], sentence: str
) -> None:
    path = forged(stopped, tmp_path, change)
    said = refused(capsys, "--resume", str(path), "--out", str(tmp_path / "new" / "out"))
    assert re.search(sentence, said)
    assert said.isprintable()
    assert len(said) < 2100
    assert not (tmp_path / "new").exists()


def test_a_forged_checkpoint_makes_no_folder_for_features(
    stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "elsewhere"
    path = forged(stopped, tmp_path, lambda meta: meta["notes"]["options"].update(cache=str(cache)))
    said = refused(capsys, "--resume", str(path))
    assert said == f"the run in {path} keeps features of texts in {cache}, which is no folder: give --cache"
    assert not cache.exists()


def test_versions_of_a_forged_checkpoint_cannot_move_the_cursor(
    stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = forged(stopped, tmp_path, lambda meta: meta["versions"].update(torch="\x1b[2J\nexssnet: all is well"))
    assert main(["train", "--resume", str(path)]) == 0
    assert capsys.readouterr().err.splitlines() == [
        f"exssnet: the checkpoint is from torch \\x1b[2J\\nexssnet: all is well, this is {torch.__version__}: "
        "results may differ in rounding"
    ]


def test_a_damaged_checkpoint_is_refused(stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = bytearray((stopped / "checkpoint.safetensors").read_bytes())
    data[-1000] ^= 8
    (tmp_path / "checkpoint.safetensors").write_bytes(data)
    said = refused(capsys, "--resume", str(tmp_path))
    assert said == f"load: {tmp_path / 'checkpoint.safetensors'}: it is damaged: its checksum is wrong"


def test_another_torch_is_told(stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "versions", lambda: {"exssnet": exssnet.__version__, "torch": "9", "cpu": "abacus"})
        assert main(["train", "--resume", str(stopped), "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().err.splitlines()
    assert (
        said[0]
        == f"exssnet: the checkpoint is from torch {torch.__version__}, this is 9: results may differ in rounding"
    )
    assert len(said) == 2


@pytest.mark.parametrize(
    "value", [["--every", "0"], ["--every-minutes", "-1"], ["--every-minutes", "nan"]], ids=" ".join
)
def test_wrong_intervals_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], value: list[str]) -> None:
    assert "every must be at least 1 and every_minutes at least 0, got " in refused(
        capsys, *value, "--out", str(tmp_path)
    )


def test_a_stopped_run_is_described(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(stopped), "--verify"]) == 0
    rows = {line[:12].strip(): line[12:] for line in capsys.readouterr().out.splitlines()}
    assert rows["file"].endswith("format exssnet-2, checksum right")
    assert rows["open task"] == "task 1, weight phase, epoch 2, after 1 of its batches"
    assert (rows["tasks"], rows["classes"]) == ("1 finished", "5, 5")
    assert "method exssnet, density 0.1" in rows["options"]
    assert "optimizer" in rows["sizes"]


def test_what_is_no_checkpoint_is_not_described(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").write_text("a text of no meaning" * 9)
    assert main(["inspect", str(tmp_path / "text")]) == 2
    assert "is no safetensors file or is damaged" in capsys.readouterr().err
