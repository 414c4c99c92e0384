"""Speed of whole models: smoke runs, tuning beforehand, and kernels told by their names."""

from __future__ import annotations

import argparse
import json
import re
import time

import pytest
import torch

throughput = pytest.importorskip("experiments.models.throughput")
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="--smoke is for machines without a GPU")


@without_gpu
def test_throughput_smoke_and_resume(begin, tmp_path):
    out = tmp_path / "throughput.json"
    options = ["--smoke", "--profile", "--repeats", "1", "--warmup", "1", "--rounds", "1", "--out", str(out)]
    for lengths in ("64", "32,64"):
        printed, _ = begin("throughput", *options, "--lengths", lengths).communicate()
        assert printed.rstrip().endswith("NOT MEASURED: smoke run"), printed
    record = json.loads(out.read_text())
    assert "not_measured" in record and not record["summary"]["failed"]
    keys = [row["key"] for row in record["rows"]]
    assert len(keys) == len(set(keys)) == 10 and "profile delta 64" in keys
    assert "7 rows kept" not in printed and "8 rows kept" in printed
    assert all(row["measured"] is False for row in record["rows"])
    assert record["summary"]["training"].keys() == {"64", "32"}


@without_gpu
def test_tuning_beforehand_smoke_run(begin):
    run = begin("throughput", "--smoke", "--tune-only", "--workers", "2")
    printed, _ = run.communicate()
    assert run.returncode == 0, printed
    # The lines that the script stamps: torch may write warnings of its own, on some Pythons.
    said = re.findall(r"^\[ *\d+\.\d s\] (.*)$", printed, re.MULTILINE)
    assert said == [f"{name}: a step at 32 is tuned and compiled" for name in ("delta", "attention")]


def test_workers_that_compile_are_stopped_at_the_budget(stubs, capsys):
    begun = time.monotonic()

    def said(budget):
        options = argparse.Namespace(workers=2, budget=budget)
        throughput.compile_beforehand(options, 2048, 16, lambda: time.monotonic() - begun, stubs.compiling)
        return [line.partition("] ")[2] for line in capsys.readouterr().out.splitlines()]

    first = "fla: 2 processes compile its kernels"
    assert said(None) == [first, "worker 0: 2048 x 16", "worker 1: 2048 x 16"]
    assert said(0.0) == [first, "worker 0: stopped at the budget", "worker 1: stopped at the budget"]
    assert time.monotonic() - begun < 300  # the stub would have slept for 600 s


def test_kernels_by_their_names():
    category = throughput.category
    names = {
        "chunk_scan_fwd": "delta rule",
        "chunk_bwd_dqk": "delta rule",
        "merge_segments": "delta rule",
        "chunk_gated_delta_rule_fwd_kernel_h_blockdim64": "delta rule",
        "recompute_w_u_fwd_kernel": "delta rule",
        "merge_16x16_to_64x64_inverse_kernel": "delta rule",
        "l2norm_fwd_kernel": "delta rule",
        "nvjet_tst_192x192_64x4_1x2_h_bz_coopB_NTT": "matrix products",
        "sm90_xmma_gemm_bf16f32_bf16f32_f32_tn_n_tilesize128x128x64": "matrix products",
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor>": "optimiser",
        "cross_entropy_fwd_kernel": "loss",
        "triton_red_fused__log_softmax_nll_loss_forward_0": "loss",
        "causal_conv1d_fwd_kernel": "convolution",
        "triton_poi_fused__to_copy_add_cat_mul_silu_slice_3": "convolution",
        "triton_red_fused__fused_rms_norm_add_1": "norms, activations",
        "layer_norm_fwd_kernel": "norms, activations",
        "swiglu_fwd_kernel": "norms, activations",
        "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128>>": "attention",
        "Memset (Device)": "copies, fills, the rest",
    }
    assert {name: category(name) for name in names} == names
