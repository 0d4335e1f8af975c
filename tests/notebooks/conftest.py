"""One run of all six notebooks, for the tests that look at what it wrote."""

from dataclasses import dataclass
from pathlib import Path

import nbformat
import papermill
import pytest
from chapters import INJECTED, NOTEBOOKS

from fedhubert_lib import params


@dataclass(frozen=True)
class Chain:
    """A run of all six notebooks."""

    run: Path
    executed: dict[str, nbformat.NotebookNode]

    def folder(self, stage: str) -> Path:
        return self.run / params.FOLDERS[stage]


@pytest.fixture(scope="session")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """All six notebooks under plain papermill, in order, as a person without the runner would start them."""
    outputs = tmp_path_factory.mktemp("chain")
    executed = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDHUBERT_OUTPUTS", str(outputs))
        for stage, path in NOTEBOOKS.items():
            parameters = {"run": "papermill", **INJECTED.get(stage, {})}
            executed[stage] = papermill.execute_notebook(
                path, outputs / path.name, parameters, progress_bar=False, cwd=outputs, execution_timeout=600
            )
    return Chain(outputs / "papermill", executed)
