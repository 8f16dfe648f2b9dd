"""The table of faults that were tried and survived, printed at the end of the tests.

A test marked ``fault("ROW  WHAT")`` counts as one try; one that tries often counts with ``tally``.
Tries travel with a test's report, so that those of several worker processes stand in one table.
"""

from collections import defaultdict

import pytest

TABLE = pytest.StashKey[dict]()
TRY = "fault"  # a property of a report: the row, and whether it was survived


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TABLE] = table = defaultdict(lambda: [0, 0])
    config.pluginmanager.register(Counter(table))


class Counter:
    """Adds up what reports say, those of workers as well."""

    def __init__(self, table: dict[str, list[int]]) -> None:
        self.table = table

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            for row, survived in (value for name, value in report.user_properties if name == TRY):
                self.table[row][0] += 1
                self.table[row][1] += survived


class Tally:
    """Counts a try of one row of the table; one that fails ends the test, and stays counted."""

    def __init__(self, item: pytest.Item, row: str) -> None:
        self.item, self.row = item, row

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, *_: object) -> None:
        self.item.user_properties.append((TRY, (self.row, kind is None)))


@pytest.fixture
def tally(request: pytest.FixtureRequest):
    """Count tries: the fixture is called with the name of the row, and its result entered."""
    return lambda row: Tally(request.node, row)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    report = yield
    marker = item.get_closest_marker("fault")
    if marker and marker.args and report.when == "call" and not report.skipped:
        report.user_properties.append((TRY, (marker.args[0], report.passed)))
    return report


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    table = config.stash[TABLE]
    if table:
        terminalreporter.section("faults: tried, survived")
        for row, (tried, survived) in sorted(
            table.items(), key=lambda each: int(each[0].split()[0])
        ):
            terminalreporter.write_line(f"{row:<64} {tried:>4} {survived:>4}")
