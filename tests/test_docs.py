"""The documentation: its code runs, its commands and names exist, its reference is whole."""

import functools
import html
import importlib.util
import inspect
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tyro

import tts_jax
from tts_jax import cli, plot, theory


ROOT = Path(__file__).parent.parent
PAGES = {str(path.relative_to(ROOT)): path for path in sorted((ROOT / "docs").rglob("*.md"))}
PAGES["README.md"] = ROOT / "README.md"
SETUP = "docs/howto/index.md"  # its block is what the other how-to pages assume
SLOW = {f"docs/howto/{name}.md" for name in ("differentiate", "own_problem", "precision", "sweeps")}
SYSTEMS = ("varpro", "implicit_diffusion", "single_location", "takakura_suzuki")
SLOW |= {f"docs/{name}.md" for name in SYSTEMS}

# Runs every page's blocks in one namespace each, in one process for all pages.
RUNNER = """
import contextlib, io, json, sys, traceback
failures = {}
for page, blocks in json.load(sys.stdin).items():
    names = {"__name__": "__main__"}
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            for block in blocks:
                exec(compile(block, page, "exec"), names)
    except Exception:
        failures[page] = traceback.format_exc(limit=-3)
print(json.dumps(failures))
"""


def blocks(page: str, language: str) -> list[str]:
    text = PAGES[page].read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def run(pages: list[str], folder: Path) -> dict[str, str]:
    """Tracebacks by page."""
    code = {}
    for page in pages:
        setup = blocks(SETUP, "python") if page.startswith("docs/howto/") else []
        code[page] = (setup if page != SETUP else []) + blocks(page, "python")
    command = [sys.executable, "-W", "error", "-c", RUNNER]
    answer = subprocess.run(
        command, input=json.dumps(code), capture_output=True, text=True, cwd=folder, check=False
    )
    assert answer.returncode == 0, answer.stderr
    return json.loads(answer.stdout.splitlines()[-1])


def with_code() -> list[str]:
    return [page for page in PAGES if page.startswith("docs/") and blocks(page, "python")]


def test_examples_run(tmp_path):
    pages = [page for page in with_code() if page not in SLOW]
    assert len(pages) > 4
    assert run(pages, tmp_path) == {}


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted(SLOW))
def test_slow_examples_run(page, tmp_path):
    assert run([page], tmp_path) == {}


# --- commands and names that pages speak of -------------------------------------------------


def commands() -> list[tuple[str, str]]:
    """Every `tts-jax ...` in a shell block, a help text or inline code."""
    found = []
    for page, path in PAGES.items():
        text = path.read_text(encoding="utf-8")
        lines = [line for block in blocks(page, "sh") for line in block.splitlines()]
        prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
        lines += re.findall(r"`([^`\n]*tts-jax [^`\n]*)`", prose)
        found += [(page, line) for line in lines if re.search(r"\btts-jax\b", line)]
    return found


@pytest.fixture
def parse(monkeypatch):
    """`cli.main` on commands that have the signatures of the real ones and do nothing."""
    app = tyro.extras.SubcommandApp()
    for name in cli.APP._subcommands:
        command = getattr(cli, name.replace("-", "_"))
        app.command(functools.wraps(command)(lambda *arguments, **options: "parsed"))
    monkeypatch.setattr(cli, "APP", app)
    assert cli.main(["resume", "nowhere"]) == "parsed"  # and nothing was run
    return cli.main


def test_commands_parse(parse, capsys):
    assert len(commands()) > 10
    wrong = []
    for page, line in commands():
        words = shlex.split(line.split("tts-jax", 1)[1], comments=True)
        if len(words) < 2 and "--" not in line:  # the name of a command
            words += ["--help"]
        if words in (["<command>", "--help"], ["--version"]):
            continue
        try:
            answer = parse(words)
        except SystemExit as exit:
            answer = "parsed" if exit.code == 0 else exit.code
        if answer != "parsed":
            wrong.append(f"{page}: {line}\n{capsys.readouterr()}")
    assert not wrong, "\n".join(wrong)


def test_an_unknown_command_would_be_noticed(parse, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(["reproduce", "figure99"])
    assert stopped.value.code == 2
    assert "figure99" in capsys.readouterr().err


def test_names_exist():
    wrong = []
    for page, path in PAGES.items():
        text = path.read_text(encoding="utf-8")
        for name in re.findall(r"`(?:tts|tts_jax)((?:\.\w+)+)\b", text):
            owner = tts_jax
            for part in name.split(".")[1:]:
                if owner is tts_jax and part == "plot":
                    owner = plot
                elif hasattr(owner, part):
                    owner = getattr(owner, part)
                else:
                    wrong.append(f"{page}: tts_jax{name}")
                    break
    assert not wrong


def test_modules_named_in_the_mathematics_exist():
    text = PAGES["docs/mathematics/index.md"].read_text(encoding="utf-8")
    names = re.findall(r"`((?:problems/)?\w+\.py)`", text)
    assert len(names) > 5
    for name in names:
        folder = ROOT / "tts_jax" / ("problems" if name.startswith("_") else "")
        assert (folder / name).exists(), name


# --- the reference --------------------------------------------------------------------------


def public() -> set[str]:
    names = {
        f"tts_jax.{name}"
        for name, value in vars(tts_jax).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    names |= {f"tts_jax.theory.{name}" for name in theory.__all__}
    return names | {f"tts_jax.plot.{name}" for name in plot.__all__}


def test_reference_is_whole():
    pages = [text for page, text in PAGES.items() if page.startswith("docs/reference/")]
    shown = {
        name
        for path in pages
        for name in re.findall(r"^::: ([\w.]+)$", path.read_text(), flags=re.MULTILINE)
    }
    missing = {
        name for name in public() if name not in shown and name.rpartition(".")[0] not in shown
    }
    assert "tts_jax.flow" in public()
    assert "tts_jax.theory" in shown
    assert not missing, f"add `::: NAME` to a page under docs/reference: {sorted(missing)}"


def test_public_names_have_docstrings():
    bare = [name for name in sorted(public()) if not inspect.getdoc(_object(name))]
    assert bare == []


def _object(name: str):
    owner = plot if name.startswith("tts_jax.plot.") else tts_jax
    return functools.reduce(
        getattr, name.removeprefix("tts_jax.").removeprefix("plot.").split("."), owner
    )


# --- the site's own code --------------------------------------------------------------------


@pytest.fixture(scope="module")
def hooks():
    for package in ("mkdocs", "griffe", "latex2mathml"):
        pytest.importorskip(package)
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_formulas_become_mathml(hooks):
    source = r"\begin{aligned} \mathbb E a &= \mathcal N \\ c &\le d \end{aligned}"
    answer = html.unescape(hooks.mathml(source, True))
    assert 'display="block"' in answer
    assert answer.count("<mtr>") == 2
    assert "𝔼" in answer
    assert "𝒩" in answer
    assert "&<" not in answer
    with pytest.raises(ValueError, match="nosuchcommand"):
        hooks.mathml(r"\nosuchcommand x", False)


def test_docstring_formulas_are_typeset_outside_of_code(hooks):
    text = "f* at v_k, λ_min and y*(x); `f*`, `v_k`, max_steps\n\n    a_k = f*\n\nz_j"
    assert hooks.typeset(text) == (
        "f<sup>∗</sup> at v<sub>k</sub>, λ<sub>min</sub> and y<sup>∗</sup>(x); `f*`, `v_k`, "
        "max_steps\n\n    a_k = f*\n\nz<sub>j</sub>"
    )


# --- notebooks ------------------------------------------------------------------------------

NOTEBOOKS = sorted((ROOT / "notebooks").glob("[a-z]*.py"))


@pytest.mark.parametrize("script", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_in_step_with_its_script(script):
    jupytext = pytest.importorskip("jupytext")
    pair = script.with_suffix(".ipynb")
    assert pair.exists(), f"make notebooks writes {pair.name}"
    text, notebook = jupytext.read(script), jupytext.read(pair)
    assert [(c.cell_type, c.source) for c in text.cells] == [
        (c.cell_type, c.source) for c in notebook.cells
    ], f"`make notebooks` brings {pair.name} up to date"
    outputs = [output for c in notebook.cells for output in c.get("outputs", ())]
    assert outputs
    assert all(output["output_type"] != "error" for output in outputs)
    assert pair.stat().st_size <= 150_000


def test_the_site_shows_every_notebook():
    listed = (ROOT / "mkdocs.yml").read_text()
    assert len(NOTEBOOKS) >= 4
    for script in NOTEBOOKS:
        assert f"notebooks/{script.stem}.md" in listed
