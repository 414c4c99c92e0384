"""Figures of chapter 3 with numbers: how large they grow, and how they round."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from matplotlib.figure import Figure
from torch import Tensor

from dn_lib.forms import householder as hh
from dn_lib.teaching import plotting
from dn_lib.teaching.figures.ch3.common import METHODS, NAMES, SOFT, correlated_keys
from dn_lib.teaching.tables import Table


# ---- What the matrices look like, and how large they are -------------------------------------------------
def three_key_sets(length: int = 16, d: int = 16) -> Figure:
    """DB, its eighth power, T, N and W for keys from independent to identical, on one colour scale.

    The largest absolute value stands under each picture.

    >>> fig = three_key_sets()
    >>> len(fig.axes), fig.axes[10].get_xlabel()
    (16, 'max 2')
    """
    cases = {"independent\nbeta 1": (0.0, 1.0), "mean cosine 0.6\nbeta 1": (0.6, 1.0), "identical\nbeta 2": (1.0, 2.0)}
    fig, axes = plotting.figure(rows=3, columns=5, height=5.0)
    for row, (name, (cosine, strength)) in zip(axes, cases.items(), strict=True):
        k, beta = correlated_keys(length, d, cosine), torch.full((length,), strength, dtype=torch.float64)
        DB, T = strength * (k @ k.mT).tril(-1), hh.ut_transform(k, beta)
        power = torch.linalg.matrix_power(DB, 8)
        shown = {"DB": DB, "(DB)^8": power, "T": T, "N": hh.scaled_inverse(k, beta), "W": T @ k}
        for ax, (title, picture) in zip(row, shown.items(), strict=True):
            image = plotting.matrix(ax, picture, f"${title}$" if ax in axes[0] else "")
            image.set_clim(-4, 4)
            largest = picture.abs().max().item()
            text = f"{largest:.2g}" if largest < 1000 else f"{largest:,.0f}"
            ax.set(xticks=[], yticks=[], xlabel=f"max {text}")
            ax.xaxis.label.set_fontsize(9.5)
        row[0].set_ylabel(name, fontsize=10)
    fig.colorbar(axes[0, 0].images[0], ax=axes, shrink=0.6, ticks=[-4, 0, 4], extend="both")
    return fig


def largest_numbers(k: Tensor, beta: Tensor, method: str) -> list[float]:
    """The largest absolute value that each matrix product of `ut_transform(k, beta, method=method)` returns.

    >>> largest_numbers(torch.ones(4, 1), torch.ones(4), "doubling")
    [2.0, 1.0]
    """
    seen = []

    def matmul(a: Tensor, b: Tensor) -> Tensor:
        product = a @ b
        seen.append(product.abs().max().item())
        return product

    hh.ut_transform(k, beta, method=method, matmul=matmul)
    return seen


def multiplications(k: Tensor, beta: Tensor, method: str) -> int:
    """The scalar multiplications in the matrix products of `ut_transform(k, beta, method=method)`.

    >>> multiplications(torch.ones(4, 1), torch.ones(4), "blocked")  # 4 (4^2 - 1) / 3
    20
    """
    counted = 0

    def matmul(a: Tensor, b: Tensor) -> Tensor:
        nonlocal counted
        product = a @ b
        counted += product.numel() * a.shape[-1]
        return product

    hh.ut_transform(k, beta, method=method, matmul=matmul)
    return counted


def numbers_on_the_way(k: Tensor, beta: Tensor) -> Figure:
    """The largest number that each product of doubling and of merging returns; zeros are left out.

    >>> len(numbers_on_the_way(correlated_keys(8, 4, 1.0), torch.full((8,), 2.0, dtype=torch.float64)).axes)
    1
    """
    fig, ax = plotting.figure(height=3.1)
    for method in ("doubling", "blocked"):
        seen = {n: size for n, size in enumerate(largest_numbers(k, beta, method), 1) if size > 0}
        ax.semilogy(list(seen), list(seen.values()), **METHODS[method])
        ax.text(
            max(seen) + 0.15,
            list(seen.values())[-1],
            NAMES.get(method, method),
            va="center",
            color=METHODS[method]["color"],
        )
    limit = torch.finfo(torch.float16).max
    ax.axhline(limit, color=SOFT, linestyle=":")
    ax.text(12.9, limit * 2, "largest number in float16", ha="right", va="bottom", fontsize=10, color="0.35")
    ax.set(xlabel="matrix product number", ylabel="largest number in the result", xlim=(0.5, 13))
    return fig


# ---- Rounding --------------------------------------------------------------------------------------------
def merged_t(k: Tensor, beta: Tensor, matmul: Callable[[Tensor, Tensor], Tensor] = torch.matmul) -> Tensor:
    """T, `[..., L, L]`, merged from the T of its halves: T_21 = -T_22 B_21 T_11.  L is a power of two.

    k: `[..., L, d]`.  beta: `[..., L]`.  The comparison for `scaled_inverse`, which merges N in the same way.

    >>> merged_t(torch.tensor([[1.0, 0.0], [0.5, 0.5]]), torch.tensor([1.0, 0.5])).tolist()
    [[1.0, 0.0], [-0.25, 0.5]]
    """
    length = beta.shape[-1]
    if length & (length - 1):
        raise ValueError(f"the number of tokens must be a power of two, got {length}")
    T, size = beta[..., None, None], 1  # a stack of diagonal blocks
    while size < length:
        halves = k.unflatten(-2, (-1, 2, size))
        first, second = T[..., 0::2, :, :], T[..., 1::2, :, :]
        across = -matmul(matmul(second, halves[..., 1, :, :] @ halves[..., 0, :, :].mT), first)
        above = torch.cat([first, torch.zeros_like(first)], dim=-1)
        T, size = torch.cat([above, torch.cat([across, second], dim=-1)], dim=-2), 2 * size
    return T[..., 0, :, :]


def rounding_error(k: Tensor, beta: Tensor, method: str, matmul: Callable[[Tensor, Tensor], Tensor]) -> float:
    """The relative error of T for float32 inputs, against a triangular solve in float64 on the same numbers.

    k: `[..., L, d]`, beta: `[..., L]`; of several chunks, the largest error.  method: one of `ut_transform`, or
    "merged T".

    >>> k, beta = correlated_keys(4, 4, 0.0), torch.ones(4)
    >>> rounding_error(k, beta, "blocked", torch.matmul) < 1e-6
    True
    """
    k, beta = k.float(), beta.float()
    exact = hh.ut_transform(k.double(), beta.double(), method="solve")
    found = (
        merged_t(k, beta, matmul) if method == "merged T" else hh.ut_transform(k, beta, method=method, matmul=matmul)
    )
    difference = torch.linalg.matrix_norm(found.double() - exact)
    return (difference / torch.linalg.matrix_norm(exact)).max().item()


def errors_against_cosine(length: int = 64, strength: float = 1.9) -> Figure:
    """The relative error of T by four methods, in float32 and with operands rounded to float16.

    >>> len(errors_against_cosine(length=8).axes)
    2
    """
    cosines, beta = torch.linspace(0, 1, 11).tolist(), torch.full((length,), strength)
    fig, axes = plotting.figure(columns=2, height=3.4, sharey=True)
    for ax, dtype, title in zip(axes, (torch.float32, torch.float16), ("float32", "float16 operands"), strict=True):
        for method in hh.UT_METHODS:
            style = METHODS[method]
            if method == "solve" and dtype == torch.float16:
                continue  # a library call: there is nothing for us to round
            matmul = hh.rounded_matmul(dtype)
            found = [rounding_error(correlated_keys(length, length, c), beta, method, matmul) for c in cosines]
            finite = [(c, e) for c, e in zip(cosines, found, strict=True) if 0 < e < float("inf")]
            ax.semilogy(*zip(*finite, strict=True), **style, label=NAMES.get(method, method))
        ax.set(title=title, xlabel="mean cosine between keys")
    axes[0].set_ylabel("relative error of $T$")
    axes[0].legend(fontsize=10.5)
    return fig


def worst_error(
    length: int, method: str, dtype: torch.dtype, strengths: Sequence[float], cosines: Sequence[float]
) -> float:
    """The largest relative error of T over all these betas and cosines, operands rounded to `dtype`.

    >>> 0 < worst_error(8, "blocked", torch.float16, [1.9], [1.0]) < 0.1
    True
    """
    return _worst_error(length, method, dtype, tuple(strengths), tuple(cosines))


@lru_cache  # the figure and the cell below it ask for the same
def _worst_error(
    length: int, method: str, dtype: torch.dtype, strengths: tuple[float, ...], cosines: tuple[float, ...]
) -> float:
    keys = torch.stack([correlated_keys(length, 64, cosine) for cosine in cosines for _ in strengths])
    betas = torch.tensor(strengths * len(cosines))[:, None].expand(-1, length)
    return rounding_error(keys, betas, method, hh.rounded_matmul(dtype))


#: The betas and cosines that `errors_against_length` tries; the worst of them counts.
STRENGTHS = {"beta up to 1": (0.5, 0.8, 0.9, 0.95, 0.99, 1.0), "beta up to 2": (1.5, 1.8, 1.9, 1.95, 1.98, 1.99, 2.0)}
COSINES = (0.5, 0.9, 0.99, 0.999, 0.9999, 1.0)


#: The relative error of T that the chapter calls safe; our choice, twice what is measured or more.
SAFE = {
    ("beta up to 1", torch.float32): 1e-5,
    ("beta up to 1", torch.float16): 5e-3,
    ("beta up to 1", torch.bfloat16): 4e-2,
    ("beta up to 2", torch.float32): 1e-4,
    ("beta up to 2", torch.float16): 6e-2,
    ("beta up to 2", torch.bfloat16): 2e-1,
}


def safety_table(length: int = 64) -> Table:
    """Whether the worst error of each method stays within the limits of `SAFE`, on the betas and cosines above.

    The solve is a library call, in which there is nothing for us to round: it has no answer in half precision.

    >>> safety_table(length=4).rows[0][:3]
    ('float32, beta up to 1', '1e-05', 'safe')
    """
    methods = ("substitution", "solve", "doubling", "merged T", "blocked")

    def verdict(method: str, top: str, dtype: torch.dtype) -> str:
        if method == "solve" and dtype != torch.float32:
            return "-"
        safe = worst_error(length, method, dtype, STRENGTHS[top], COSINES) < SAFE[top, dtype]
        return "safe" if safe else "fails"  # also where the error is not a number

    rows = []
    for (top, dtype), limit in SAFE.items():
        allowed = f"{limit:.0e}" if limit < 1e-3 else f"{100 * limit:g}%"
        name = f"{str(dtype).removeprefix('torch.')}, {top}"
        rows.append((name, allowed, *(verdict(method, top, dtype) for method in methods)))
    titles = (NAMES.get(method, method).replace("$", "") for method in methods)
    return Table(("operands", "error allowed", *titles), rows)


def errors_against_length(sizes: Sequence[int] = (16, 32, 64, 128, 256)) -> Figure:
    """The worst relative error of T over the betas and cosines above, against the length of the chunk.

    Float16 has filled markers, bfloat16 open ones.

    >>> len(errors_against_length(sizes=(4, 8)).axes)
    2
    """
    fig, axes = plotting.figure(columns=2, height=3.4, sharey=True)
    for ax, (title, strengths) in zip(axes, STRENGTHS.items(), strict=True):
        for dtype, fill in ((torch.bfloat16, "none"), (torch.float16, "full")):
            for method in ("blocked", "merged T", "substitution"):
                found = [worst_error(C, method, dtype, strengths, COSINES) for C in sizes]
                label = NAMES.get(method, method) if fill == "full" else None
                ax.loglog(sizes, found, **METHODS[method], fillstyle=fill, label=label)
        ax.axhline(0.01, color=SOFT, linestyle=":", lw=1)
        ax.set(title=title, xlabel="tokens in a chunk")
        ax.set_xticks(list(sizes), [str(size) for size in sizes], minor=False)
        ax.set_xticks([], minor=True)
    axes[0].set_ylabel("worst relative error of $T$")
    axes[1].text(sizes[-1], 0.0093, "one per cent", fontsize=10, color="0.35", va="top", ha="right")
    axes[0].legend(fontsize=10.5, loc="upper left")
    return fig
