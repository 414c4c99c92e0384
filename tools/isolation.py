"""Where chapters run: a place that no personal setting reaches, so that every machine shows the same book.

`isolate()` is called by whatever starts kernels (`tools.notebooks.execute`, and conftest.py for nbval).  It changes
the environment of this process, from which kernels and other children take theirs:

- settings of Python, IPython, Jupyter, Matplotlib, PyTorch's logs, colours, language and terminal are taken away, and
  so are this library's own (all but where its cache is);
- IPython, Jupyter and Matplotlib get an empty folder each for their settings, and the kernel is this Python;
- start-up code of the user's (`usercustomize`, a `sitecustomize` on PYTHONPATH) finds an empty module in its place.

What says where things are, or how many threads there are, stays: PATH, caches, CUDA_*, OMP_*, MKL_*, OPENBLAS_*.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import sys
import tempfile
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Variables that change what a chapter prints, draws or computes; those that only say where something is are kept.
PREFIXES = ("DN_LIB_", "IPYTHON", "JUPYTER", "LC_", "MATPLOTLIB", "MPL", "PYTHON", "TORCHDYNAMO_", "TQDM_")
NAMES = {
    *("CLICOLOR", "CLICOLOR_FORCE", "COLORTERM", "COLUMNS", "FORCE_COLOR", "LINES", "NO_COLOR", "PY_COLORS", "TERM"),
    *("LANG", "LANGUAGE", "TZ"),
    *("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"),
    *("MLIR_ENABLE_DUMP", "TORCH_CPP_LOG_LEVEL", "TORCH_LOGS", "TORCH_TRACE", "TRITON_DEBUG"),
    "TRITON_PRINT_AUTOTUNING",
}
KEPT = {"DN_LIB_CACHE", "PYTHONDONTWRITEBYTECODE", "PYTHONHOME", "PYTHONNOUSERSITE", "PYTHONPYCACHEPREFIX"}

# Seconds for a kernel to start, and for outputs to arrive. By themselves kernels wait 10 seconds for the thread that
# sends outputs and nbclient then 4, after which outputs are lost: a right chapter would fail on a busy machine.
PATIENCE = 900

KERNEL = {
    "argv": [
        *(sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"),
        f'--IPKernelApp.exec_lines=__import__("ipykernel.iostream").iostream.OutStream.flush_timeout = {PATIENCE}',
        # A torch for GPUs warns of nvcc on a machine that has no GPU, as soon as its timer is imported.
        '--IPKernelApp.exec_lines=__import__("logging").getLogger("torch.utils.cpp_extension").setLevel("ERROR")',
    ],
    "display_name": "Python 3 (ipykernel)",
    "language": "python",
}

_lock = threading.Lock()
_folder: Path | None = None


def isolate() -> Path:
    """Take personal settings out of this process's environment; the folder that stands for them.

    Done once in a process: later calls return the same folder, and look at nothing again.
    """
    global _folder
    with _lock:
        if _folder is None:
            _folder = Path(tempfile.mkdtemp(prefix="dn_lib_isolated_"))
            atexit.register(shutil.rmtree, _folder, ignore_errors=True)
            _fill(_folder)
            settings = isolated(dict(os.environ), _folder)
            for name in set(os.environ) - set(settings):
                del os.environ[name]
            os.environ.update(settings)
    return _folder


def isolated(environment: dict[str, str], folder: Path) -> dict[str, str]:
    """`environment` without personal settings, and with the folders of settings below `folder`.

    >>> isolated({"PATH": "/bin", "COLUMNS": "40", "PYTHONOPTIMIZE": "1"}, Path("/x"))["PATH"]
    '/bin'
    >>> "COLUMNS" in isolated({"COLUMNS": "40"}, Path("/x"))
    False
    """
    kept = {
        name: value
        for name, value in environment.items()
        if name in KEPT or not (name in NAMES or name.startswith(PREFIXES))
    }
    path = [part for part in environment.get("PYTHONPATH", "").split(os.pathsep) if part]
    own = [str(folder / "python"), str(ROOT)]
    if any((Path(part) / "sitecustomize.py").exists() for part in path):
        own.insert(0, str(folder / "site"))
    return kept | {
        "IPYTHONDIR": str(folder / "ipython"),
        "JUPYTER_CONFIG_DIR": str(folder / "jupyter" / "config"),
        "JUPYTER_DATA_DIR": str(folder / "jupyter"),
        "JUPYTER_NO_CONFIG": "1",
        "JUPYTER_PATH": str(folder / "jupyter"),
        "JUPYTER_PLATFORM_DIRS": "1",
        "MATPLOTLIBRC": str(folder / "matplotlib" / "matplotlibrc"),
        "MPLCONFIGDIR": str(folder / "matplotlib"),
        "PYTHONPATH": os.pathsep.join(dict.fromkeys([*own, *path])),
        "PYTHONUTF8": "1",
        "TZ": "UTC",
    }


def _fill(folder: Path) -> None:
    """The empty settings, the kernel, and Matplotlib's list of fonts, which takes seconds to make."""
    for name in ("ipython", "jupyter/config", "jupyter/kernels/python3", "matplotlib", "python", "site"):
        (folder / name).mkdir(parents=True)
    (folder / "python" / "usercustomize.py").touch()
    (folder / "site" / "sitecustomize.py").touch()
    (folder / "matplotlib" / "matplotlibrc").touch()
    (folder / "jupyter" / "kernels" / "python3" / "kernel.json").write_text(json.dumps(KERNEL))

    import matplotlib.font_manager  # makes the list where there is none, before this process moves away from it

    for fonts in Path(matplotlib.get_cachedir()).glob("fontlist-*.json"):
        shutil.copy(fonts, folder / "matplotlib")
    matplotlib.rcdefaults()  # of this process, which has read the user's file
