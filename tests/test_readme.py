"""The README's examples run as printed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_example_runs_as_printed_without_flags(number, tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    answer = subprocess.run(
        [sys.executable, "-W", "error", "-c", BLOCKS[number]],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
    )
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout


def test_there_are_examples():
    assert len(BLOCKS) == 2
