"""The table of faults that were tried and survived, printed at the end of the tests.

A test marked ``fault("ROW  WHAT")`` counts as one try; one that tries often counts with ``tally``.
"""

from collections import defaultdict

import pytest

TABLE = pytest.StashKey[dict]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TABLE] = defaultdict(lambda: [0, 0])


class Tally:
    """Counts tries of one row of the table; a try that fails ends the test, and stays counted."""

    def __init__(self, cell: list[int]) -> None:
        self.cell = cell

    def __enter__(self) -> None:
        self.cell[0] += 1

    def __exit__(self, kind: type | None, *_: object) -> None:
        self.cell[1] += kind is None


@pytest.fixture
def tally(request: pytest.FixtureRequest):
    """Count tries: the fixture is called with the name of the row, and its result entered."""
    return lambda row: Tally(request.config.stash[TABLE][row])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    report = yield
    marker = item.get_closest_marker("fault")
    if marker and marker.args and report.when == "call" and not report.skipped:
        cell = item.config.stash[TABLE][marker.args[0]]
        cell[0] += 1
        cell[1] += report.passed
    return report


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    table = config.stash[TABLE]
    if table:
        terminalreporter.section("faults: tried, survived")
        for row, (tried, survived) in sorted(
            table.items(), key=lambda each: int(each[0].split()[0])
        ):
            terminalreporter.write_line(f"{row:<64} {tried:>4} {survived:>4}")
