"""Importing the package costs little more than importing JAX."""

import json
import subprocess
import sys


MEASURE = """
import json, sys, time
import jax, diffrax
began = time.process_time()
import tts_jax
print(json.dumps({"seconds": time.process_time() - began, "modules": sorted(sys.modules)}))
"""
HEAVY = {"matplotlib", "xarray", "h5netcdf", "pandas", "tyro", "tqdm"}


def measure():
    run = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_import_adds_at_most_half_a_second_to_jax_and_diffrax():
    assert min(measure()["seconds"] for _ in range(3)) <= 0.5


def test_import_leaves_plotting_labels_and_the_command_line_alone():
    loaded = {name.partition(".")[0] for name in measure()["modules"]}
    assert "tts_jax" in loaded
    assert not loaded & HEAVY
