# Assigned: it is the help, and python -OO drops docstrings.
__doc__ = """\
Re-run notebooks in place and store their outputs: tools/execute.py NOTEBOOK ...

Cells tagged `gpu` keep their stored outputs on a machine without a GPU. What changes
from run to run (timings, counters, kernel versions) is normalised, so that a diff shows
only what changed for the reader.
"""

import os
import sys
import time
from pathlib import Path

import nbformat
import torch
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

KEEP = {"tags", "mystnb"}  # the cell metadata that means something to the book
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
CELL_TIMEOUT_S = 1800
SHELL = "MPLBACKEND", "FORCE_COLOR", "CLICOLOR_FORCE", "PYTHON_COLORS", "COLUMNS"


def execute(path: Path) -> None:
    """Run one notebook from its own folder, normalise it and write it back."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook,
        timeout=CELL_TIMEOUT_S,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        skip_cells_with_tag="" if torch.cuda.is_available() else "gpu",
        resources={"metadata": {"path": str(path.parent)}},
    ).execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for count, cell in enumerate(code, start=1):
        cell.execution_count = count
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = count
    for cell in notebook.cells:
        cell.metadata = {k: v for k, v in cell.metadata.items() if k in KEEP}
    notebook.metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    nbformat.write(nbformat.from_dict(notebook), path)


def main(names: list[str]) -> None:
    # As conftest.py: the kernel must draw inline, without colour and in one width, whatever
    # this shell has set.
    for name in SHELL:
        os.environ.pop(name, None)
    for name in names:
        start = time.perf_counter()
        try:
            execute(Path(name))
        except CellExecutionError as error:  # its text holds the cell and the traceback
            sys.exit(f"{name}: a cell raised; the file is unchanged\n\n{error}")
        print(f"{name}: executed in {time.perf_counter() - start:.1f} s", flush=True)


if __name__ == "__main__":
    if not sys.argv[1:]:
        sys.exit(__doc__)
    try:
        main(sys.argv[1:])
    except BrokenPipeError:  # the reader (head, say) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
