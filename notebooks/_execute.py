"""Execute the notebooks: each script in percent format becomes an .ipynb with its outputs.

    python notebooks/_execute.py [--out DIR] [NAME ...]

By default the .ipynb is written beside its script: the pair that is committed. It is kept small:
figures at few colours, no HTML, no widgets, nothing that changes from run to run but the outputs.
TTS_JAX_NOTEBOOK_SCALE chooses the settings, "small" (for what is committed) or "full".
"""

import argparse
import base64
import io
import os
import sys
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from PIL import Image


FOLDER = Path(__file__).parent
LIMIT = 150_000  # bytes of a committed notebook
COLOURS = 64


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="notebooks, by default all")
    parser.add_argument("--out", type=Path, default=FOLDER, metavar="DIR", help="where to write")
    arguments = parser.parse_args()
    os.environ.setdefault("TTS_JAX_NOTEBOOK_SCALE", "small")
    names = arguments.names or sorted(path.stem for path in FOLDER.glob("[a-z]*.py"))
    too_large = []
    for name in names:
        began = time.perf_counter()
        notebook = execute(FOLDER / f"{name}.py")
        path = arguments.out / f"{name}.ipynb"
        path.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")
        size = path.stat().st_size
        print(f"{path}: {time.perf_counter() - began:.0f} s, {size / 1000:.0f} kB", flush=True)
        if size > LIMIT:
            too_large.append(name)
    if too_large and os.environ["TTS_JAX_NOTEBOOK_SCALE"] == "small":
        print(f"larger than {LIMIT / 1000:.0f} kB: {', '.join(too_large)}", file=sys.stderr)
        return 1
    return 0


def execute(script: Path) -> nbformat.NotebookNode:
    """The notebook of a script with its outputs; raises where a cell raises."""
    notebook = jupytext.read(script)
    NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": str(FOLDER)}}).execute()
    notebook.metadata.pop("language_info", None)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [shrunk(output) for output in cell.outputs if printed(output)]
    return notebook


def printed(output: nbformat.NotebookNode) -> bool:
    """Progress bars and warnings of compilers go to stderr."""
    return output.get("name") != "stderr"


def shrunk(output: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """An output in its smallest form: an image with few colours, else plain text."""
    data = output.get("data", {})
    if data:
        output["metadata"] = {}
    if "image/png" in data:
        drawing = Image.open(io.BytesIO(base64.b64decode(data["image/png"]))).convert("RGB")
        file = io.BytesIO()
        drawing.quantize(COLOURS).save(file, "PNG", optimize=True)
        text = base64.b64encode(file.getvalue()).decode()
        output["data"] = nbformat.NotebookNode({"image/png": text})
    else:
        data.pop("text/html", None)
    return output


if __name__ == "__main__":
    sys.exit(main())
