"""Same weights, same logits: fla's DeltaNetForCausalLM against ours, on a GPU with fla installed.

    python benchmarks/check_fla_conversion.py --out book/results/fla_conversion.json

For each variant a small fla model with random weights is built and converted. Logits of random tokens are
compared as relative norms, |ours - fla's| / |fla's|, once with all weights in float32 and once in bfloat16. The
lengths lie on both sides of 64 tokens, where fla changes from its recurrent to its chunkwise kernel; the latter
refuses float32, which is recorded as such.

float32 tells a wrong conversion: four layers, weights three times as large as fla's initial ones, so that every
layer has a say. bfloat16 tells whether both round alike: two layers, fla's own initial weights. A distance there is
made of the rounding of either side, and that grows with depth; so each row also has both sides' distance from our
model in float64 (the PyTorch forms, on the CPU) with the same, rounded, weights. `bfloat16 deep` shows the four
layers in bfloat16, without a limit.

Exits with 1 if a bfloat16 distance between the two exceeds `--tolerance`, or a float32 one 1e-3, or if nothing
could be compared in one of them.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from pathlib import Path

import torch
from measure import first_line, load_fla, plain
from provenance import package_version, provenance

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


SORTS = {  # name: (dtype, layers, standard deviation of the weights)
    "float32": (torch.float32, 4, 0.06),
    "bfloat16": (torch.bfloat16, 2, 0.02),
    "bfloat16 deep": (torch.bfloat16, 4, 0.06),
}


def build_fla(options: dict, layers: int, std: float, seed: int):
    """A random fla model in float32, and its configuration."""
    from fla.models import DeltaNetConfig, DeltaNetForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 256, "num_heads": 4, "num_hidden_layers": layers, "vocab_size": 512}
    config = DeltaNetConfig(**sizes, initializer_range=std, **options)
    return DeltaNetForCausalLM(config).eval(), config


@torch.no_grad()
def compare(theirs, ours, exact, tokens: torch.Tensor, device: str) -> dict:
    """Distances for one batch of tokens; a refusal by fla is recorded as its message."""
    row = {"shape": list(tokens.shape)}
    reference = exact(tokens)
    o = ours(tokens.to(device))
    row["ours_to_float64"] = relative(o, reference)
    try:
        f = theirs(tokens.to(device), use_cache=False).logits
    except Exception as error:
        return row | {"refused_by_fla": first_line(error)[:200]}
    row["fla_to_float64"] = relative(f, reference)
    row["ours_to_fla"] = relative(o, f)
    row["same_argmax"] = (o.argmax(-1) == f.argmax(-1)).float().mean().item()
    return row


def run(device: str, lengths: list[int], seed: int, sorts=SORTS, variants=VARIANTS, budget: float | None = None):
    """One row for each variant, sort and length; an exception becomes a row with `failure`."""
    begun = time.monotonic()
    for name, options in variants.items():
        for sort, (dtype, layers, std) in sorts.items():
            if budget is not None and time.monotonic() - begun > budget:
                yield {"variant": name, "sort": sort, "failure": f"not begun: {budget:g} s were over"}
                continue
            try:
                theirs, config = build_fla(options, layers, std, seed)
                theirs = theirs.to(dtype)
                state = theirs.state_dict()
                exact = from_fla_state_dict({n: t.double() for n, t in state.items()}, config)
                ours, theirs = from_fla_state_dict(state, config).to(device), theirs.to(device)
            except Exception as error:
                yield {"variant": name, "sort": sort, "failure": first_line(error)}
                continue
            for length in lengths:
                tokens = torch.randint(0, 512, (2, length), generator=torch.Generator().manual_seed(length))
                about = {"variant": name, "sort": sort, "layers": layers}
                try:
                    yield about | compare(theirs, ours, exact, tokens, device)
                except Exception as error:
                    yield about | {"shape": [2, length], "failure": first_line(error)}


def verdict(rows: list[dict], limits: dict[str, float]) -> tuple[dict, bool]:
    """(the worst distance of each sort, whether all is within its limit and nothing failed)."""
    worst = {
        sort: max((r["ours_to_fla"] for r in rows if r["sort"] == sort and "ours_to_fla" in r), default=None)
        for sort in SORTS
    }
    within = all(worst[sort] is not None and worst[sort] <= limit for sort, limit in limits.items())
    return worst, within and not any("failure" in row for row in rows)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    parser.add_argument("--lengths", type=int, nargs="+", default=[7, 64, 65, 300])
    parser.add_argument("--tolerance", type=float, default=2e-2, help="for bfloat16 (default 2e-2)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--budget", type=float, metavar="S", help="begin no model after so many seconds")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device: run this on a machine with an NVIDIA GPU")
    warnings.filterwarnings("ignore", message="ShortConvolution is crucial")
    peer = load_fla(skip=False)
    if peer.status != "present":
        parser.error(f"fla is {peer.status}: pip install flash-linear-attention==0.6.0 transformers")
    peer.cut = True  # its autotuners take their first configuration: this is no measurement of time
    limits = {"float32": FLOAT32_TOLERANCE, "bfloat16": options.tolerance}
    versions = {"fla": package_version("flash-linear-attention"), "transformers": package_version("transformers")}
    report = {"provenance": provenance(seed=options.seed, **versions), "limits": limits, "rows": []}
    for row in run(options.device, options.lengths, options.seed, budget=options.budget):
        report["rows"].append(plain(row))
        report["worst"], report["passed"] = verdict(report["rows"], limits)
        print(json.dumps(plain(row)), flush=True)
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({"worst": report["worst"], "limits": limits, "passed": report["passed"]}))
    return 0 if report["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
