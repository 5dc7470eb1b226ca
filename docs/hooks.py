"""What the documentation site needs beyond MkDocs; see mkdocs.yml.

- Pages that live elsewhere in the repository: benchmark results, the changelog, the notebooks.
- Pages under docs/ that the navigation does not list, at the end of its section "Results".
- The help of all commands, where a page says `<!-- commands -->`.
- Formulas: MathML made by latex2mathml, so that no page needs JavaScript or a network for them.
- `Typography`: indices and stars in the docstrings' formulas.
"""

import base64
import contextlib
import io
import json
import os
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import griffe
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page


ROOT = Path(__file__).parent.parent
ELSEWHERE = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "benchmarks/README.md",
    "benchmarks/results.md",
    "benchmarks/results.png",
    "benchmarks/flow_results.md",
    "benchmarks/flow_results.png",
    "benchmarks/gpu_results.md",
)
SECTION = "Results"
_INDEXED = re.compile(
    r"(?<![A-Za-z_])(argmin|[A-Za-zα-ωΑ-Ω∇∂]{1,2})_(ij|ji|min|max|[a-z0-9])(?![A-Za-z0-9])"
)
_SIDES = {"l": r"\left", "r": r"\right"}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """List what the navigation does not."""
    listed = set(re.findall(r"[\w/]+\.md", str(config.nav)))
    docs = Path(config.docs_dir)
    pages = sorted(str(path.relative_to(docs)) for path in docs.rglob("*.md"))
    pages += [f"notebooks/{path.stem}.md" for path in _notebooks()]
    section = next(entry[SECTION] for entry in config.nav or () if SECTION in entry)
    section += [page for page in pages if page not in listed]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files from outside docs/."""
    for name in ELSEWHERE:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    for path in _notebooks():
        text, images = notebook_page(path)
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=text))
        for name, content in images.items():
            files.append(File.generated(config, f"notebooks/{name}", content=content))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Put in the help of the command line; links of pages from elsewhere go to their sources."""
    if page.file.src_uri in ELSEWHERE:
        # the README is not a page; what it says is on others
        markdown = re.sub(r"\[([^\]]+)\]\((\.\./)?README\.md\)", r"\1", markdown)
    return markdown.replace("<!-- commands -->", _commands()) if "<!-- c" in markdown else markdown


def on_page_content(html: str, page: Page, **_: Any) -> str:
    """Render the formulas that arithmatex marked."""

    def rendered(found: re.Match) -> str:
        tag, source = found[1], _unescape(found[2])
        try:
            return f'<{tag} class="arithmatex">{mathml(source, tag == "div")}</{tag}>'
        except Exception as error:
            raise PluginError(f"{page.file.src_uri}: formula `{source}`: {error!r}") from error

    return re.sub(
        r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', rendered, html, flags=re.DOTALL
    )


# --- formulas -------------------------------------------------------------------------------


def mathml(source: str, display: bool) -> str:
    """A formula in LaTeX as MathML.

    Raises:
        ValueError: it holds a command that latex2mathml does not know.
    """
    # the same thing by another name; KaTeX and MathJax know both
    source = re.sub(r"\b(aligned|gathered)\b", "split", " ".join(source.split()))
    # a bracket that grows with what it holds sits on the line in every browser
    source = re.sub(r"\\[bB]igg?(l|r)\b", lambda found: _SIDES[found[1]], source)
    answer = convert(source, display="block" if display else "inline")
    unknown = re.findall(r"\\\w*|<m\w+>&</m\w+>", answer)
    if unknown:
        raise ValueError(f"not known to latex2mathml: {unknown}")
    # no space around a slash and inside of bars
    answer = re.sub(
        r"<mo( [^>]*)?>(&#x0002F;|&#x0007C;)</mo>", r'<mo\1 lspace="0" rspace="0">\2</mo>', answer
    )
    # browsers draw letters of other alphabets, not the attribute that asks for them
    return re.sub(
        r'<mi mathvariant="(double-struck|script|bold)">(?:&#x(\w+);|(\w))</mi>',
        lambda found: f"<mi>{_letter(found[1], found[3] or chr(int(found[2], 16)))}</mi>",
        answer,
    )


def _letter(alphabet: str, letter: str) -> str:
    case = "CAPITAL" if letter.isupper() else "SMALL"
    for start in (f"MATHEMATICAL {alphabet}", alphabet):
        with contextlib.suppress(KeyError):
            return unicodedata.lookup(f"{start} {case} {letter}".upper())
    raise ValueError(f"there is no letter {letter} {alphabet}")


def _unescape(html: str) -> str:
    for name, sign in (("&lt;", "<"), ("&gt;", ">"), ("&amp;", "&")):
        html = html.replace(name, sign)
    return html


class Typography(griffe.Extension):
    """Formulas in docstrings are plain text; here a_ij gets its index and f* its star."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for every object of the package."""
        if obj.docstring is not None:
            obj.docstring.value = typeset(obj.docstring.value)


def typeset(docstring: str) -> str:
    """`docstring` with subscripts and stars as HTML, outside of code."""
    # code is between backticks, or an indented paragraph
    parts = re.split(r"(`[^`]*`|\n\n(?: {4,}.*(?:\n|\Z))+)", docstring)
    for index in range(0, len(parts), 2):
        text = re.sub(r"(?<=[\w)])\*(?![\w*])", "<sup>∗</sup>", parts[index])
        parts[index] = _INDEXED.sub(r"\1<sub>\2</sub>", text)
    return "".join(parts)


# --- pages ----------------------------------------------------------------------------------


def _notebooks() -> list[Path]:
    return sorted((ROOT / "notebooks").glob("*.ipynb"))


def notebook_page(path: Path) -> tuple[str, dict[str, bytes]]:
    """A notebook with its outputs as Markdown, and its images by name."""
    parts, images = [], {}
    for number, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source.replace(".ipynb)", ".md)"))
            continue
        source = source.replace("%matplotlib inline\n", "")
        parts.append(f"```python\n{source}\n```")
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if "image/png" in data:
                name = f"{path.stem}_{number}.png"
                images[name] = base64.b64decode("".join(data["image/png"]))
                parts.append(f"![output of the cell above]({name})")
                continue
            text = "".join(output.get("text", data.get("text/plain", ())))
            parts.append(f"```text\n{text.rstrip()}\n```")
    source = f"notebooks/{path.stem}.py"
    parts.append(
        f"---\n\nThis page is `{source}` with its outputs at small settings; "
        f"`jupyter lab {source}` or any editor that knows percent scripts opens it."
    )
    return "\n\n".join(parts), images


def _commands() -> str:
    """The help of all commands."""
    from tts_jax import cli

    os.environ["COLUMNS"] = "80"
    names = list(cli.APP._subcommands)
    return "\n\n".join(
        f"## tts-jax{command and ' '}{command}\n\n```text\n{_help(cli.main, command)}\n```"
        for command in ("", *names)
    )


def _help(main: Callable[[list[str]], int], command: str) -> str:
    """What `tts-jax command --help` prints, in black and white."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        main([*command.split(), "--help"])
    return re.sub(r"\x1b\[[0-9;]*m", "", text.getvalue()).rstrip()
