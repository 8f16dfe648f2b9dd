"""Freed memory stays for the next step."""

import json
import subprocess
import sys

import pytest

SCRIPT = """
import json, resource
import torch
from w2s_train.cli import keep_freed_memory

def faults():
    found = []
    for _ in range(20):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        blocks = [torch.ones(10_000_000) for _ in range(4)]
        del blocks
        found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return sorted(found[5:])[7]

given_back = faults()
assert keep_freed_memory()
print(json.dumps([given_back, faults()]))
"""


@pytest.mark.slow
def test_no_page_faults_once_memory_was_used():
    """Four blocks of 40 MB are 40,000 pages of 4 KiB."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, check=True)
    given_back, kept = json.loads(done.stdout)
    assert kept < 100 < 10_000 < given_back, (kept, given_back)
