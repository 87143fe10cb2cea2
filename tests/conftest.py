"""What holds for every test: fresh memory is NaN, seeds are fixed, one thread works."""

import os
import warnings
from collections import defaultdict
from collections.abc import Iterator

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic algorithms ask of CUDA

import pytest
import torch
from hypothesis import settings
from recorded_graph import RecordedGraph
from tiers import GPU_SECONDS, LARGEST, LARGEST_PROOF, representatives, time_limit

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # a missing native library warns, and its tests are skipped with a reason
    import exssnet.ops  # noqa: F401
from exssnet.kernels import native as native_library
from exssnet.nn import graphs

torch.use_deterministic_algorithms(True)
torch.utils.deterministic.fill_uninitialized_memory = True  # torch.empty is NaN, or the largest integer
settings.register_profile("exssnet", derandomize=True, deadline=None, database=None)
settings.load_profile("exssnet")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`device` is the CPU, and CUDA where there is one."""
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


@pytest.hookimpl(tryfirst=True)  # before pytest deselects by marker
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        skip_without_cuda(items, all_told=config.option.markexpr.startswith("gpu"))
    thin_grids(config, items)


def thin_grids(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of a test with a large grid of parameters, a case that does not stand for the grid is marked as a proof.

    Of a test that is a proof itself, such a case is left out, unless EXSSNET_WHOLE_GRIDS is set.
    """
    left_out: set[pytest.Item] = set()
    grids: dict[tuple[str, object], list[pytest.Item]] = defaultdict(list)
    for item in items:
        if hasattr(item, "callspec"):
            grids[item.nodeid.partition("[")[0], item.callspec.params.get("device")].append(item)
    for (test, _), cases in grids.items():
        is_proof = all(case.get_closest_marker("proof") is not None for case in cases)
        if len(cases) > (LARGEST_PROOF if is_proof else LARGEST):
            chosen = representatives([case.callspec._idlist for case in cases], test)  # one id for each parametrization
            others = [case for i, case in enumerate(cases) if i not in chosen]
            if not is_proof:
                for case in others:
                    case.add_marker("proof")
            elif "EXSSNET_WHOLE_GRIDS" not in os.environ:
                left_out.update(others)
    if left_out:
        config.hook.pytest_deselected(items=list(left_out))
        items[:] = [item for item in items if item not in left_out]


def skip_without_cuda(items: list[pytest.Item], all_told: bool) -> None:
    """The tests that need a GPU are skipped. One in each file says so, or all of them."""
    told: set[object] = set()
    kept = []
    for item in items:
        if item.get_closest_marker("gpu") is None:
            kept.append(item)
        elif all_told or item.path not in told:
            told.add(item.path)
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
            kept.append(item)
    items[:] = kept


@pytest.fixture(autouse=True, scope="session")
def _default_settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Also of processes that tests start; what is measured is neither read from nor written to the user's file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        for pin in ("EXSSNET_PRODUCTS", "EXSSNET_MASKING"):
            patch.delenv(pin, raising=False)
        yield


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def terminal(request: pytest.FixtureRequest) -> Iterator[int]:
    """A file descriptor of the real stderr, which pytest does not capture."""
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        descriptor = os.dup(2)
    yield descriptor
    os.close(descriptor)


@pytest.fixture(autouse=True)
def _limited(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that needs a GPU has a time limit."""
    if request.node.get_closest_marker("gpu") is None:
        yield
    else:
        with time_limit(GPU_SECONDS, request.getfixturevalue("terminal")):
            yield


@pytest.fixture(params=[1, 2], ids=["1thread", "2threads"])
def threads(request: pytest.FixtureRequest) -> int:
    """How many threads torch, and so every kernel, works with; one in tests without this fixture."""
    torch.set_num_threads(request.param)
    return int(request.param)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> type[RecordedGraph]:
    """Graphs on the CPU."""
    monkeypatch.setitem(graphs.GRAPHS, "cpu", RecordedGraph)
    monkeypatch.setattr(RecordedGraph, "captures", 0)
    monkeypatch.setattr(RecordedGraph, "replays", 0)
    return RecordedGraph


@pytest.fixture
def native() -> None:
    """For tests of the compiled library itself."""
    if native_library.missing is not None:
        pytest.skip(f"no native library: {native_library.missing}")
