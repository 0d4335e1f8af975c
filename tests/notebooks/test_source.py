"""The notebooks as they are written: short cells, prose between them, no code that belongs in the library."""

import ast
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from chapters import NOTEBOOKS, OWN

from fedhubert_lib import params

LONGEST = 25


def read(path: Path) -> list[nbformat.NotebookNode]:
    notebook = nbformat.read(path, 4)
    assert notebook.metadata.kernelspec.name == "python3", "papermill needs the kernel's name"
    return notebook.cells


@pytest.fixture(params=[*NOTEBOOKS.values(), OWN], ids=lambda path: path.stem)
def cells(request: pytest.FixtureRequest) -> list[nbformat.NotebookNode]:
    return read(request.param)


def test_the_ledger_leaves_out_what_clients_do_not_tell():
    """With privacy: client, how long they took: a column of None, which is no zero."""
    (cell,) = [cell.source for cell in read(NOTEBOOKS["pretrain"]) if "spent = " in cell.source]
    told = pd.DataFrame({"bytes_up": [5, 6], "client_seconds": [None, None], "server_seconds": [0.125, 1.0]})
    names = {"per_round": told}
    exec("\n".join(line for line in cell.splitlines() if line.startswith(("sums = ", "spent = "))), names)
    assert names["spent"] == {"bytes_up": 11.0, "server_seconds": 1.12}


def test_begins_with_an_idea_and_its_parameters(cells):
    assert cells[0].cell_type == "markdown"
    assert cells[0].source.startswith("# ")
    assert cells[1].metadata.tags == ["parameters"]
    assert all(" # " in " " + line for line in cells[1].source.splitlines()), "each parameter says what it is"


@pytest.mark.parametrize("stage", NOTEBOOKS)
def test_starts_and_finishes_the_stage(stage):
    cells = read(NOTEBOOKS[stage])
    code = [cell.source for cell in cells if cell.cell_type == "code"]
    assert f'stage = runs.start("{stage}", globals())' in code[1]
    assert "runs.finish(stage, headline)" in code[-1]
    assert any("with stage.working()" in source for source in code[2:]), "the lock, the record, an interrupt in a line"


@pytest.mark.parametrize("stage", NOTEBOOKS)
def test_no_cell_sets_what_is_a_parameter(stage):
    """In a kernel that is warm, the next start would take it for the parameter's value."""
    cells = read(NOTEBOOKS[stage])
    for cell in cells[2:]:
        if cell.cell_type == "code":
            names = {node.id for node in ast.walk(ast.parse(cell.source)) if _is_set(node)}
            assert not names & params.SECTIONS[stage].model_fields.keys()
            assert "display" not in names | set(cell.source.split()), "IPython's display stays what it is"


def _is_set(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)


def test_cells_are_short_and_half_of_them_prose(cells):
    code = [cell.source for cell in cells if cell.cell_type == "code"]
    assert max(len(source.splitlines()) for source in code[:1] + code[2:] if source != code[0]) <= LONGEST
    assert len(cells) - len(code) >= 0.4 * len(cells)
    assert len(cells) <= 40


def test_defines_nothing(cells):
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    for cell in cells:
        if cell.cell_type == "code":
            assert not any(isinstance(node, definitions) for node in ast.walk(ast.parse(cell.source)))


def test_says_what_to_look_for_beside_every_picture(cells):
    for index, cell in enumerate(cells):
        if cell.cell_type == "code" and "plots." in cell.source and "import" not in cell.source:
            prose = cells[index - 1]
            assert prose.cell_type == "markdown", f"no prose before: {cell.source}"
