"""Faults on purpose, in short: see tests/faults/faults.py, which runs them by hand in numbers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "faults" / "faults.py"


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="limits are set as Linux has them")
def test_no_fault_leaves_other_results_or_goes_untold():
    pytest.importorskip("matplotlib")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, SCRIPT, "--kills", "2", "--rounds", "1", "--quick"]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert ", 0 wrong" in done.stdout
