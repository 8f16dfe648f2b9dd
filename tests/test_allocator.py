"""Freed memory stays for the next step."""

import subprocess
import sys

SCRIPT = """
import resource, sys
import torch
from w2s_train.command.run import keep_freed_memory
keep = sys.argv[1] == "keep"
assert not keep or keep_freed_memory()
faults = []
for _ in range(20):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(10_000_000) for _ in range(4)]
    del blocks
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(sorted(faults[5:])[7])
"""


def test_no_page_faults_once_memory_was_used():
    """Four blocks of 40 MB are 40,000 pages of 4 KiB."""
    found = {}
    for mode in ("keep", "give back"):
        command = [sys.executable, "-c", SCRIPT, mode]
        found[mode] = int(subprocess.run(command, capture_output=True, check=True).stdout)
    assert found["keep"] < 100 < 10_000 < found["give back"], found
