"""The notebook for readers of the papers: it is committed with its outputs, and runs."""

import json
import re
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parent.parent / "docs" / "papers.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]


def test_outputs_are_those_of_one_run_from_the_top_with_plots_and_without_errors():
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    outputs = [output for cell in CODE for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 4
    assert NOTEBOOK.stat().st_size < 500_000


def test_every_section_names_its_source_and_links_resolve():
    sections = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "markdown"]
    numbered = [text for text in sections if re.match(r"## \d", text)]
    assert [text[3] for text in numbered] == list("1234567")
    assert all(re.search(r"\[[AB]\] (section|table)|arXiv", text) for text in numbered)
    for target in re.findall(r"\]\(([^)#]+)", "\n".join(sections)):
        assert target.startswith("https://") or (NOTEBOOK.parent / target).exists(), target


@pytest.mark.slow
def test_it_runs_and_its_assertions_hold(tmp_path):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    printed = "".join(output.get("text", "") for output in outputs)
    leaks = dict(re.findall(r"(\w+) +loss .* a leak of (-?[\d.]+) nats", printed))
    assert abs(float(leaks["nf_resnet_nano"])) < 0.001 < 0.1 < float(leaks["resnet_nano"])
