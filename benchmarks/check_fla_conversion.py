"""Same weights, same logits: fla's DeltaNetForCausalLM against ours, on a GPU with fla installed.

    python benchmarks/check_fla_conversion.py --out book/results/fla_conversion.json

For each variant a small fla model with random weights is built and converted. Logits of random tokens are
compared as relative norms, |ours - fla's| / |fla's|, once with all weights in float32 and once in bfloat16. The
lengths lie on both sides of 64 tokens, where fla changes from its recurrent to its chunkwise kernel; the latter
refuses float32, which is recorded as such. `float64_reference` is each side's distance from our model in float64
with the PyTorch forms on the CPU, which tells rounding from a wrong conversion. Exits with 1 if a bfloat16
distance between the two exceeds `--tolerance`, or a float32 one 1e-3.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import subprocess
import sys
import warnings
from pathlib import Path

import torch

import dn_lib
from dn_lib.convert import from_fla_state_dict

VARIANTS = {
    "as in the paper": {},
    "output gate": {"use_gate": True},
    "no short convolution": {"use_short_conv": False},
    "beta up to 2": {"allow_neg_eigval": True},
    "relu, sum norm": {"qk_activation": "relu", "qk_norm": "sum"},
    "1 + elu": {"qk_activation": "elu"},
    "tied embeddings": {"tie_word_embeddings": True},
}
FLOAT32_TOLERANCE = 1e-3  # TF32 in some of the products of either side: a relative rounding of 2^-11


def relative(x: torch.Tensor, reference: torch.Tensor) -> float:
    x, reference = x.double().cpu(), reference.double().cpu()
    return ((x - reference).norm() / reference.norm()).item()


def build_fla(options: dict, seed: int):
    """A random fla model; weights larger than its initial ones, so that every layer has a say."""
    from fla.models import DeltaNetConfig, DeltaNetForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 256, "num_heads": 4, "num_hidden_layers": 4, "vocab_size": 512}
    config = DeltaNetConfig(**sizes, initializer_range=0.06, **options)
    return DeltaNetForCausalLM(config).eval(), config


@torch.no_grad()
def compare(theirs, config, dtype: torch.dtype, tokens: torch.Tensor, reference: torch.Tensor) -> dict:
    """Distances for one variant, dtype and batch of tokens; a refusal by fla is recorded as its message."""
    theirs = theirs.to(tokens.device, dtype)
    ours = from_fla_state_dict(theirs.state_dict(), config).to(tokens.device)
    row = {"dtype": str(dtype).removeprefix("torch."), "shape": list(tokens.shape)}
    o = ours(tokens)
    row["ours_to_float64"] = relative(o, reference)
    try:
        f = theirs(tokens).logits
    except Exception as error:
        return row | {"refused_by_fla": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    row["fla_to_float64"] = relative(f, reference)
    row["ours_to_fla"] = relative(o, f)
    row["same_argmax"] = (o.argmax(-1) == f.argmax(-1)).float().mean().item()
    return row


def run(device: str, lengths: list[int], seed: int) -> list[dict]:
    rows = []
    for name, options in VARIANTS.items():
        theirs, config = build_fla(options, seed)
        state = {n: t.double() for n, t in theirs.state_dict().items()}
        exact = from_fla_state_dict(state, config)
        for length in lengths:
            tokens = torch.randint(0, 512, (2, length), generator=torch.Generator().manual_seed(length))
            with torch.no_grad():
                reference = exact(tokens)
            for dtype in (torch.float32, torch.bfloat16):  # this order: the rounding to bfloat16 is for good
                fresh, _ = build_fla(options, seed)
                row = compare(fresh, config, dtype, tokens.to(device), reference)
                rows.append({"variant": name, **row})
    return rows


def provenance(arguments: argparse.Namespace) -> dict:
    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "command": " ".join(["python", *sys.argv]),
        "commit": git.stdout.strip() or None,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if arguments.device == "cuda" else arguments.device,
        "versions": {p: version(p) for p in ("torch", "triton", "flash-linear-attention", "transformers")}
        | {"dn_lib": dn_lib.__version__},
        "seed": arguments.seed,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    parser.add_argument("--lengths", type=int, nargs="+", default=[7, 64, 65, 300, 1024])
    parser.add_argument("--tolerance", type=float, default=2e-2, help="for bfloat16 (default 2e-2)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device: run this on a machine with an NVIDIA GPU")
    try:
        warnings.filterwarnings("ignore", message="ShortConvolution is crucial")
        import fla  # noqa: F401
    except ImportError:
        parser.error("fla is missing: pip install flash-linear-attention==0.6.0")
    rows = run(arguments.device, arguments.lengths, arguments.seed)
    limits = {"float32": FLOAT32_TOLERANCE, "bfloat16": arguments.tolerance}
    worst = {
        dtype: max((r["ours_to_fla"] for r in rows if r["dtype"] == dtype and "ours_to_fla" in r), default=None)
        for dtype in limits
    }
    passed = all(worst[d] is not None and worst[d] <= limit for d, limit in limits.items())
    report = {**provenance(arguments), "limits": limits, "worst": worst, "passed": passed, "rows": rows}
    text = json.dumps(report, indent=1)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(text + "\n")
    print(text)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
