"""Runs a notebook's script and writes the notebook, pictures and all, beside it.

    python -m examples.notebook examples/choose_what_to_compute.py

The script is what is edited. Needs the extras `report` and `test`.
"""

import argparse
import base64
import io
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from PIL import Image

# for the kernel to start, and for any one cell
SECONDS = 300
COLORS = 256


def read(script: Path) -> nbformat.NotebookNode:
    """The notebook of a script, without outputs; a cell's id is its number."""
    notebook = jupytext.read(script)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
    return notebook


def execute(notebook: nbformat.NotebookNode, folder: Path) -> nbformat.NotebookNode:
    """Runs all cells in a kernel of their own, from a folder.

    Raises:
      CellExecutionError: if a cell does.
    """
    client = NotebookClient(
        notebook,
        timeout=SECONDS,
        startup_timeout=SECONDS,
        record_timing=False,
        resources={"metadata": {"path": str(folder)}},
    )
    return client.execute()


def fewer_colors(png: str) -> str:
    """A picture in base64, with a palette: about half the bytes."""
    picture, file = Image.open(io.BytesIO(base64.b64decode(png))), io.BytesIO()
    picture.convert("RGB").quantize(COLORS, kmeans=4).save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def main() -> None:
    parser = argparse.ArgumentParser(prog="notebook", description=__doc__.split("\n")[0])
    parser.add_argument("script", type=Path, metavar="SCRIPT")
    script = parser.parse_args().script
    notebook = execute(read(script), script.parent)
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            pictures = output.get("data", {})
            if "image/png" in pictures:
                pictures["image/png"] = fewer_colors(pictures["image/png"])
    target = script.with_suffix(".ipynb")
    nbformat.write(notebook, target)
    print(f"notebook: {target}, {target.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
