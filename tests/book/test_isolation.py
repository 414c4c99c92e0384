"""What executes chapters sees no personal setting: a notebook made under hostile ones is the same, byte for byte."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from tools.isolation import KEPT, NAMES, PREFIXES, isolated

ROOT = Path(__file__).resolve().parents[2]
CHAPTER = """---
jupytext:
  text_representation: {extension: .md, format_name: myst}
kernelspec: {display_name: Python 3, language: python, name: python3}
---

# Tiny

```{code-cell} ipython3
import locale, os, shutil, sys, time, warnings
1
2
```

```{code-cell} ipython3
print("left behind" if "surprise" in globals() or hasattr(sys, "surprise") else "nothing is left behind")
strict = ("error", ResourceWarning) in {(kind, category) for kind, _, category, *_ in warnings.filters}
print(sys.flags.optimize, strict, locale.getpreferredencoding(False))
print(time.tzname[0], shutil.get_terminal_size().columns, {"α": os.environ.get("DN_LIB_MINUTES")})
```

```{code-cell} ipython3
---
mystnb:
  image: {alt: "A line that rises from zero to one"}
  figure: {caption: "A line.", name: fig-1-1}
---
import matplotlib.pyplot as plt

fig, ax = plt.subplots(figsize=(2, 1))
ax.plot([0, 1], label="T")
_ = ax.set_title("A title")
plt.show()
```
"""
# Executes a notebook in place with what JupyterLab would use: the environment as it is.
PLAINLY = """
import sys, nbformat, nbclient
notebook = nbformat.read(sys.argv[1], as_version=4)
nbclient.NotebookClient(notebook, kernel_name="python3", allow_errors=True).execute()
nbformat.write(notebook, sys.argv[1])
"""


def write(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path.parent)


def hostile(home: Path) -> dict[str, str]:
    """The environment of somebody who has set everything that can be set."""
    profile = home / ".ipython" / "profile_default"
    for name in ("ipython_config.py", "ipython_kernel_config.py"):
        write(profile / name, "c.InteractiveShell.ast_node_interactivity = 'all'\n")
    write(profile / "startup" / "00.py", "surprise = 1\n")
    dark = "axes.facecolor: black\ntext.color: white\nsavefig.facecolor: black\nlines.linewidth: 9\n"
    write(home / ".config" / "matplotlib" / "matplotlibrc", dark)
    write(home / ".config" / "matplotlib" / "stylelib" / "mine.mplstyle", "not a style\n")
    kernel = {"argv": ["false"], "display_name": "Another Python", "language": "python"}
    write(home / ".local" / "share" / "jupyter" / "kernels" / "python3" / "kernel.json", json.dumps(kernel))
    startup = home / "python"
    write(startup / "sitecustomize.py", "import sys\nsys.surprise = 1\n")
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith(("IPY", "JUP", "MPL", "MATPL"))},
        "HOME": str(home),
        "XDG_CACHE_HOME": os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache")),  # Matplotlib's list of fonts
        "PYTHONPATH": os.pathsep.join([str(startup), str(ROOT)]),
        "PYTHONOPTIMIZE": "2",
        "PYTHONWARNINGS": "error::ResourceWarning",
        "PYTHONSTARTUP": str(profile / "startup" / "00.py"),
        "MATPLOTLIBRC": str(home / ".config" / "matplotlib" / "matplotlibrc"),
        "MPLBACKEND": "pdf",
        "LC_ALL": "de_DE.ISO-8859-1",
        "TZ": "Asia/Kathmandu",
        "COLUMNS": "20",
        "FORCE_COLOR": "1",
        "TORCH_LOGS": "+dynamo",
        "DN_LIB_MINUTES": "5",
        "DN_LIB_CHECKED": "1",
    }


def run(*command: str, environment: dict[str, str], cwd: Path = ROOT) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, Path]:
    """The notebook as `tools.notebooks` makes it in this environment and in a hostile one."""
    folder = tmp_path_factory.mktemp("chapters")
    (folder / "01_tiny.md").write_text(CHAPTER, encoding="utf-8")
    environments = {"here": dict(os.environ), "hostile": hostile(folder / "home")}
    environments["hostile"]["PYTHONIOENCODING"] = "ascii"  # of the console
    for name, environment in environments.items():
        command = ("-m", "tools.notebooks", "--sources-dir", str(folder), "--out-dir", str(folder / name))
        done = run(*command, environment=environment)
        assert done.returncode == 0, done.stdout + done.stderr
    return {name: folder / name / "01_tiny.ipynb" for name in environments} | {"home": folder / "home"}


def test_a_notebook_is_the_same_under_hostile_settings(made):
    assert made["hostile"].read_bytes() == made["here"].read_bytes()
    cells = [cell for cell in nbformat.read(made["hostile"], as_version=4).cells if cell.cell_type == "code"]
    del cells[0]  # the one that installs
    assert [output.data["text/plain"] for output in cells[0].outputs] == ["2"]
    expected = "nothing is left behind\n0 False UTF-8\nUTC 80 {'α': None}\n"
    assert cells[1].outputs[0].text.lower() == expected.lower()
    assert "image/png" in cells[2].outputs[0].data


def test_nbval_passes_under_hostile_settings(made):
    command = ("-m", "pytest", "--nbval", "-p", "conftest", "-p", "no:cacheprovider", "-p", "no:xdist")
    done = run(*command, str(made["here"]), environment=hostile(made["home"]))
    assert done.returncode == 0 and "4 passed" in done.stdout, done.stdout + done.stderr


def test_canary_those_settings_do_change_a_notebook_that_is_not_isolated(made, tmp_path):
    notebook = tmp_path / "plain.ipynb"
    notebook.write_bytes(made["here"].read_bytes())
    environment = hostile(made["home"])
    (made["home"] / ".local" / "share" / "jupyter" / "kernels" / "python3" / "kernel.json").unlink()
    done = run("-c", PLAINLY, str(notebook), environment=environment)
    assert done.returncode == 0, done.stderr
    cells = [cell for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == "code"]
    del cells[0]  # the one that installs
    assert len([output for output in cells[0].outputs if output.output_type == "execute_result"]) == 2
    printed = "".join(output.text for output in cells[1].outputs if output.get("name") == "stdout")
    assert printed.startswith("left behind\n2 True ") and "'α': '5'" in printed
    assert not any("image/png" in output.get("data", {}) for output in cells[2].outputs)


def test_the_environment_keeps_what_says_where_things_are(tmp_path):
    places = {"PATH": "/bin", "HOME": "/h", "CUDA_VISIBLE_DEVICES": "1", "OMP_NUM_THREADS": "3", "DN_LIB_CACHE": "/c"}
    settings = dict.fromkeys([*NAMES, *(f"{prefix}X" for prefix in PREFIXES)], "personal")
    found = isolated(places | settings, tmp_path)
    assert places.items() <= found.items()
    assert "personal" not in found.values()
    assert KEPT.isdisjoint(NAMES)


def test_packages_on_the_path_of_python_stay_reachable(tmp_path):
    (tmp_path / "site").mkdir()
    theirs = tmp_path / "modules"
    theirs.mkdir()
    path = isolated({"PYTHONPATH": str(theirs)}, tmp_path)["PYTHONPATH"].split(os.pathsep)
    assert path[-1] == str(theirs) and str(tmp_path / "site") not in path
    (theirs / "sitecustomize.py").touch()
    path = isolated({"PYTHONPATH": str(theirs)}, tmp_path)["PYTHONPATH"].split(os.pathsep)
    assert path[0] == str(tmp_path / "site") and path[-1] == str(theirs)
