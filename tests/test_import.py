"""Importing the package costs little more than importing JAX; systems import what users can."""

import ast
import importlib
import inspect
import json
import subprocess
import sys

import pytest

import tts_jax as tts


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


SYSTEMS = ("implicit_diffusion", "kim_suzuki", "single_location", "takakura_suzuki")


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_system_imports_only_what_a_user_can(system):
    module = importlib.import_module(f"tts_jax.problems.{system}")
    tree = ast.parse(inspect.getsource(module))
    for node in ast.walk(tree):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names = []
        if isinstance(node, ast.ImportFrom):
            modules, names = [node.module or ""], [alias.name for alias in node.names]
        for name in modules + names:
            assert not any(part.startswith("_") for part in name.split(".")), name
        for name in names if modules[:1] == ["tts_jax"] else []:
            assert hasattr(tts, name)
