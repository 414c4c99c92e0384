"""A larger corpus that others can repeat: Python source from a fixed list of PyPI wheels.

Nothing of it is kept in the repository.  `python -m dn_lib prepare-data wheels` fetches the wheels with
pip, which checks every hash, takes the `.py` files out of them, drops those seen before, and writes
memory-mapped token files.  All wheels are `py3-none-any`: the same files on every machine.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from dn_lib.data.corpus import Corpus, check_target
from dn_lib.data.downloads import DEADLINE, cache_folder
from dn_lib.data.files import alone, make_folder
from dn_lib.data.sources import build_corpus
from dn_lib.data.tokens import DataError, check_vocab

# Chosen for hand-written, varied source. Left out: generated API clients and tables of data, and
# libraries that copy the same model file many times over.
WHEELS = {
    "bokeh==3.6.2": "fddc4b91f8b40178c0e3e83dfcc33886d7803a3a1f041a840834255e435a18c2",
    "celery==5.4.0": "369631eb580cf8c51a82721ec538684994f8277637edde2dfc0dacd73ed97f64",
    "cirq-core==1.4.1": "869db60413265c41a8206854c1d4ca9bad5fac9cfd7c6a10685b5a6d516defa0",
    "dask==2024.12.1": "1f32acddf1a6994e3af6734756f0a92467c47050bc29f3555bb9b140420e8e19",
    "django==5.1.4": "236e023f021f5ce7dee5779de7b286565fdea5f4ab86bae5338e3f7b69896cf0",
    "docutils==0.21.2": "dafca5b9e384f0e419294eb4d2ff9fa826435bf15f15b7bd45723e8ad76811b2",
    "homeassistant==2024.12.5": "a7b3e13ac8c2b93a79807c51e3715b36c8459c9cbddb8bf448d69d18a49b703d",
    "ipython==8.31.0": "46ec58f8d3d076a61d128fe517a51eb730e3aaf0c184ea8c17d16e366660c6a6",
    "jax==0.4.38": "78987306f7041ea8500d99df1a17c33ed92620c2268c4c3677fb24e06712be64",
    "keras==3.7.0": "546a64f302e4779c129c06d9826fa586de752cdfd43d7dc4010c31b282587969",
    "langchain-community==0.3.13": "d6f623d59d44ea85b9cafac8ca6e9970c343bf892a9a3252b3f25e30df339be2",
    "mne==1.9.0": "c26da9ac59bce963c5b25a3be9f5f61dd128f980cdc178a6fceef27743734306",
    "networkx==3.4.2": "df5d4365b724cf81b8c6a7312509d0c22386097011ad1abe274afd5e9d3bbc5f",
    "nltk==3.9.1": "4fa26829c5b00715afe3061398a8989dc643b92ce7dd93fb4585a70930d168a1",
    "pennylane==0.39.0": "e11928a8ffd652b9c1b4f11955b50210c3b637f36ee3d8cea64a3a9a6a830977",
    "pylint==3.3.3": "26e271a2bc8bce0fc23833805a9076dd9b4d5194e2a02164942cb3cdc37b4183",
    "sagemaker==2.237.1": "a752e8a19fceb9059859767ba8afa3c4f45e0960531d4f96a66d4dfdaef36cfe",
    "setuptools==75.6.0": "ce74b49e8f7110f9bf04883b730f4765b774ef3ef28f722cce7c273d253aaf7d",
    "sphinx==8.1.3": "09719015511837b76bf6e03e42eb7595ac8c2e41eeb9c29c5b755c6b677992a2",
    "sympy==1.13.3": "54612cf55a62755ee71824ce692986f23c88ffa77207b30c1368eda4a7060f73",
    "twisted==24.11.0": "fe403076c71f04d5d2d789a755b687c5637ec3bcd3b2b8252d76f2ba65f54261",
    "wagtail==6.3.2": "ac72f7138281ef47360057ebfb835a8eae34048efeed10ca9f4aabbc8f4e4ea5",
}
SMALLEST, LARGEST = 64, 256 * 1024
"""Files outside these sizes (empty package markers, generated tables) are left out."""


def download_wheels(folder: str | Path, wheels: dict[str, str] | None = None) -> list[Path]:
    """Fetch the pinned wheels into `folder` through pip; return their paths in the order of the list.

    A second process that wants them waits, and takes what the first has fetched.
    Raises DataError with pip's last line if a wheel cannot be had or has another hash.
    """
    wheels = WHEELS if wheels is None else wheels
    folder = Path(folder)
    make_folder(folder, "the place of the wheels")
    with alone(folder / "wheels", DEADLINE):
        return _download_missing(folder, wheels)


def _download_missing(folder: Path, wheels: dict[str, str]) -> list[Path]:
    paths = [_find(folder, pin, sha256) for pin, sha256 in wheels.items()]
    missing = [pin for pin, path in zip(wheels, paths, strict=True) if path is None]
    if missing:
        with tempfile.TemporaryDirectory() as work:
            pins = Path(work) / "requirements.txt"
            pins.write_text("".join(f"{pin} --hash=sha256:{wheels[pin]}\n" for pin in missing))
            # fmt: off
            command = [
                sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
                "--no-deps", "--require-hashes", "--only-binary=:all:", "--platform", "any",
                "--python-version", "3.13", "--dest", str(folder), "--requirement", str(pins),
            ]
            # fmt: on
            try:
                done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=DEADLINE)
            except subprocess.TimeoutExpired:
                raise DataError(f"pip did not fetch the wheels within {DEADLINE:.0f} seconds: run again") from None
        if done.returncode:
            lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
            errors = [line for line in lines if line.startswith("ERROR")] or lines or ["no message"]
            raise DataError(f"pip could not fetch the wheels: {errors[0]}")
        paths = [_find(folder, pin, sha256) for pin, sha256 in wheels.items()]
    for pin, path in zip(wheels, paths, strict=True):
        if path is None:
            raise DataError(f"wheel {pin} is missing from {folder} after the download")
    return [path for path in paths if path is not None]


def _find(folder: Path, pin: str, sha256: str) -> Path | None:
    name, version = pin.split("==")
    for path in folder.glob(f"*-{version}-*.whl"):
        if path.name.split("-")[0].lower().replace("_", "-") == name:
            with open(path, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() == sha256:
                    return path
    return None


def wheel_documents(paths: list[Path]) -> Iterator[tuple[str, bytes]]:
    """(path, content) of the `.py` files in the wheels, each content once.

    Raises DataError for a wheel that is damaged.
    """
    seen = set()
    for path in paths:
        try:
            for name, content in _python_files(path):
                digest = hashlib.sha256(content).digest()
                if digest not in seen and b"\0" not in content:
                    seen.add(digest)
                    yield name, content
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
            raise DataError(f"wheel {path} cannot be read: {' '.join(str(error).split())}") from None


def _python_files(path: Path) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(path) as wheel:
        for info in sorted(wheel.infolist(), key=lambda info: info.filename):
            if info.filename.endswith(".py") and SMALLEST <= info.file_size <= LARGEST:
                yield info.filename, wheel.read(info)


def prepare_wheels(
    target: str | Path | None = None, *, vocab: int | None = None, wheels: dict[str, str] | None = None
) -> Corpus:
    """Download, extract, split by folder (neighbouring files resemble each other), write, and open.

    target: folder of the prepared corpus; by default `wheels` in the cache, where "wheels" finds it.
    """
    target = check_target(cache_folder() / "wheels" if target is None else target)
    if vocab is not None:
        check_vocab(vocab)  # before anything is fetched
    chosen = WHEELS if wheels is None else wheels
    paths = download_wheels(cache_folder() / "wheel-files", chosen)
    pins = hashlib.sha256("".join(f"{pin} {digest}\n" for pin, digest in chosen.items()).encode())
    corpus = build_corpus(
        wheel_documents(paths),
        name="wheels",
        vocab=vocab,
        split_by="folder",
        wheels=list(chosen),
        wheels_sha256=pins.hexdigest(),
    )
    corpus.save(target)
    return Corpus.open(target)
