"""Chapter 3: products of Householder matrices, the WY representation and the UT transform."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle
from math import pi

import torch
from torch import Tensor
from torch.nn.functional import normalize

from dn_lib.forms.delta_rule import recurrent_delta_rule
from dn_lib.forms.householder import UT_METHODS, householder_matrix, scaled_inverse, ut_transform, wy_recursion
from dn_lib.teaching.registry import Exercise, Mutant


def _randn(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _rand(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(shape, generator=generator, dtype=torch.float64)


def _integer(generator: torch.Generator, low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, (), generator=generator))


def _eye(n: int) -> Tensor:
    return torch.eye(n, dtype=torch.float64)


def _keys(generator: torch.Generator, low: int = 3, high: int = 9) -> tuple[Tensor, Tensor]:
    length, d = _integer(generator, low, high), _integer(generator, 2, 5)
    return normalize(_randn(generator, length, d), dim=-1), 0.1 + 1.9 * _rand(generator, length)


# ---- 3.1: a reflection that carries a to b ---------------------------------------------------------------


def _two_vectors(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    d = _integer(generator, 2, 6)
    a, b = _randn(generator, d), _randn(generator, d)
    return a, b * a.norm() / b.norm()


def _reflection(a: Tensor, b: Tensor) -> Tensor:
    return householder_matrix(normalize(a - b, dim=0), 2.0)


REFLECTION = Exercise(
    number="3.1",
    title="A reflection from a to b",
    stars=1,
    minutes=5,
    sample=_two_vectors,
    reference=_reflection,
    mutants=(
        Mutant(
            lambda a, b: householder_matrix(normalize(a + b, dim=0), 2.0),
            "your matrix carries a to -b: its mirror is across the wrong line.",
            "The mirror leaves a + b where it is. Which direction does it turn round?",
        ),
        Mutant(
            lambda a, b: householder_matrix(a - b, 2.0),
            "beta |k|^2 is not 2: your key is not a unit vector, so this is no reflection.",
            "Look at the eigenvalue of H along k when k has any length.",
        ),
        Mutant(
            lambda a, b: householder_matrix(normalize(a - b, dim=0), 1.0),
            "this carries a half of the way, to the mirror itself: you project.",
            "Which beta projects, and which reflects?",
        ),
        Mutant(
            lambda a, b: torch.outer(b, a) / (a @ a),
            "it does carry a to b, but it forgets everything else: its rank is one.",
            "Start from I - beta k k^T, and find k and beta.",
        ),
    ),
    tested="8 pairs of vectors of equal length, in 2 to 6 dimensions, in float64",
)

# ---- 3.2: two reflections make a rotation ----------------------------------------------------------------


def _at(angle: Tensor) -> Tensor:
    return torch.stack([angle.cos(), angle.sin()])


def _keys_for_rotation(theta: Tensor, share: float = 0.5, sign: float = 1.0) -> Tensor:
    return torch.stack([_at(0 * theta), _at(sign * share * theta)])


def _rotation(theta: Tensor, share: float = 0.5, sign: float = 1.0) -> Tensor:
    first, second = _keys_for_rotation(theta, share, sign)
    return householder_matrix(second, 2.0) @ householder_matrix(first, 2.0)


ROTATION = Exercise(
    number="3.2",
    title="A rotation from two writes",
    stars=1,
    minutes=8,
    sample=lambda generator: (0.2 + 2.5 * _rand(generator),),
    reference=_rotation,
    mutants=(
        Mutant(
            lambda theta: _rotation(theta, share=1.0),
            "it turns by 2 theta: the angle between the keys is not the angle of the rotation.",
            "Follow the first key through both reflections, and measure how far it went.",
        ),
        Mutant(
            lambda theta: _rotation(theta, sign=-1.0),
            "it turns clockwise: you have the inverse rotation, the two factors in the other order.",
            "The step that acts first stands on the right.",
        ),
        Mutant(
            lambda theta: householder_matrix(_at(theta / 2 + pi / 2), 2.0),
            "this is one reflection: its determinant is -1, a rotation's is 1.",
            "How many reflections does it take to get the handedness back?",
        ),
    ),
    tested="8 angles between 0.2 and 2.7, in float64",
)

# ---- 3.3: the other order --------------------------------------------------------------------------------


def _keys_and_w(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    k, beta = _keys(generator)
    return k, wy_recursion(k, beta)


OTHER_ORDER = Exercise(
    number="3.3",
    title="The product in the other order",
    stars=1,
    minutes=5,
    sample=_keys_and_w,
    reference=lambda k, w: _eye(k.shape[-1]) - w.mT @ k,
    mutants=(
        Mutant(
            lambda k, w: _eye(k.shape[-1]) - k.mT @ w,
            "this is H_L ... H_1, the newest factor on the left.",
            "What does transposing do to a product of symmetric matrices?",
        ),
        Mutant(
            lambda k, w: _eye(k.shape[-1]) + w.mT @ k,
            "the sign: each factor removes something from the identity.",
            "Try a single factor with w_1 = beta_1 k_1.",
        ),
        Mutant(
            lambda k, w: torch.linalg.inv(_eye(k.shape[-1]) - k.mT @ w),
            "this is the inverse product: it undoes the steps, and it exists only if no step projects.",
            "You need the same factors in the other order, not their inverses.",
        ),
    ),
    tested="8 products of 3 to 9 factors, in float64",
)

# ---- 3.4: counting ---------------------------------------------------------------------------------------

COUNT = Exercise(
    number="3.4",
    title="Count them without the zeros",
    stars=1,
    minutes=10,
    sample=lambda generator: (_integer(generator, 4, 200),),
    reference=lambda length: length * (length - 1) * (length + 1) // 6,
    mutants=(
        Mutant(
            lambda length: length * (length - 1) // 2,
            "this is the cost of one right-hand side; T has as many columns as rows.",
            "Every column j of T is a system of its own. How many unknowns does it have?",
        ),
        Mutant(
            lambda length: length * (length - 1) * (2 * length - 1) // 6,
            "you multiply by the zeros above the diagonal of T too.",
            "T_mj is zero for m < j: where does the sum over m start?",
        ),
        Mutant(
            lambda length: length**3,
            "this is a product of two full matrices.",
            "Both matrices are triangular. Count for one entry (i, j), then sum over i > j.",
        ),
        Mutant(
            lambda length: length * (length + 1) * (length + 2) // 6,
            "you count one product too many for each entry, and the diagonal, which needs none.",
            "Write out the sum for entry (2, 1), and for (3, 1).",
        ),
    ),
    tested="8 sizes between 4 and 200, exactly",
)

# ---- 3.5: forward substitution ---------------------------------------------------------------------------


def _substitute(
    A: Tensor, beta: Tensor, start: Callable[[int], Tensor], before: Callable[[int, list[Tensor]], Tensor]
) -> Tensor:
    rows: list[Tensor] = []
    for i in range(len(beta)):
        rows.append(start(i) - sum((A[i, j] * before(j, rows) for j in range(i)), 0 * beta))
    return torch.stack(rows)


def _scaled_gram(k: Tensor, beta: Tensor) -> Tensor:
    return beta[:, None] * (k @ k.mT)


def _unit(beta: Tensor, i: int) -> Tensor:
    return _eye(len(beta))[i]


SUBSTITUTION = Exercise(
    number="3.5",
    title="T, row by row",
    stars=2,
    minutes=15,
    sample=_keys,
    reference=lambda k, beta: ut_transform(k, beta, method="substitution"),
    mutants=(
        Mutant(
            lambda k, beta: _substitute(_scaled_gram(k, beta), beta, lambda i: _unit(beta, i), lambda j, rows: rows[j]),
            "this is (I + A)^{-1}, without its last factor diag(beta).",
            "Compare your diagonal with beta.",
        ),
        Mutant(
            lambda k, beta: _substitute(
                _scaled_gram(k, beta),
                beta,
                lambda i: beta[i] * _unit(beta, i),
                lambda j, rows: _unit(beta, j),
            ),
            "you subtract rows of the identity, so that each write sees the one before it but not the rest.",
            "The rows above row i are finished when you reach it: use them.",
        ),
        Mutant(
            lambda k, beta: _substitute(
                (k @ k.mT) * beta, beta, lambda i: beta[i] * _unit(beta, i), lambda j, rows: rows[j]
            ),
            "beta_j scales the sum where beta_i should: the writer's strength in place of the reader's.",
            "In u_i = beta_i (...), which beta stands outside the bracket?",
        ),
        Mutant(
            lambda k, beta: _substitute(
                -_scaled_gram(k, beta), beta, lambda i: beta[i] * _unit(beta, i), lambda j, rows: rows[j]
            ),
            "the sign of the sum: earlier writes are subtracted, not added.",
            "With two identical keys and beta = 1, what should the second row be?",
        ),
    ),
    tested="8 random shapes of unit keys, beta in (0.1, 2), in float64",
)

# ---- 3.6: merging two blocks of N ------------------------------------------------------------------------


def _two_blocks(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    (k1, beta1), m = _keys(generator, 2, 5), _integer(generator, 2, 5)
    k2, beta2 = normalize(_randn(generator, m, k1.shape[-1]), dim=-1), 2 * _rand(generator, m)
    return scaled_inverse(k1, beta1), scaled_inverse(k2, beta2), k2 @ k1.mT, beta1, beta2


def _merge(N11: Tensor, N22: Tensor, L21: Tensor, beta1: Tensor, beta2: Tensor) -> Tensor:
    left = L21 + N22 @ (beta2[:, None] * L21)
    return -(left + left @ (beta1[:, None] * N11))


MERGE = Exercise(
    number="3.6",
    title="Merge two blocks of N",
    stars=2,
    minutes=15,
    sample=_two_blocks,
    reference=_merge,
    mutants=(
        Mutant(
            lambda N11, N22, L21, beta1, beta2: -_merge(N11, N22, L21, beta1, beta2),
            "the sign: N begins with -B.",
            "Take blocks of size one, where N_11 = N_22 = 0.",
        ),
        Mutant(
            lambda N11, N22, L21, beta1, beta2: _merge(N11.mT, N22.mT, L21, beta1, beta2),
            "your blocks are transposed: scaling a row is not scaling a column.",
            "N is lower triangular. Which index of N_22 does D_2 scale?",
        ),
        Mutant(
            lambda N11, N22, L21, beta1, beta2: (
                -(L21 + beta2[:, None] * (N22 @ L21) + (L21 + beta2[:, None] * (N22 @ L21)) @ (N11 * beta1))
            ),
            "D stands outside of N: you scale the reader of N_22 and the writer of N_11.",
            "The betas in a chain belong to the writes in the middle, between L_21 and the two blocks.",
        ),
        Mutant(
            lambda N11, N22, L21, beta1, beta2: -(L21 + N22 @ (beta2[:, None] * L21) + L21 @ (beta1[:, None] * N11)),
            "paths that go through both blocks are missing: N_22 D_2 L_21 D_1 N_11.",
            "Multiply the two brackets out. How many terms are there?",
        ),
        Mutant(
            lambda N11, N22, L21, beta1, beta2: _merge(N11, N22, L21, torch.ones_like(beta1), torch.ones_like(beta2)),
            "your betas are all 1: they are nowhere in the formula.",
            "T = D + D N D takes the betas at the two ends. Those in the middle are left to N.",
        ),
    ),
    tested="8 pairs of blocks of different sizes, in float64",
)

# ---- 3.7: a property test --------------------------------------------------------------------------------


def _inverse(A: Tensor) -> Tensor:
    return torch.linalg.inv(torch.eye(A.shape[-1], dtype=A.dtype) + A)


def _right(method: str) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda k, beta: ut_transform(k, beta, method=method)


def _clamped(k: Tensor, beta: Tensor) -> Tensor:
    return ut_transform(k, beta.clamp(max=1.0))


def _divided(k: Tensor, beta: Tensor) -> Tensor:
    """T^{-1} = diag(1/beta) (I + A), computed by dividing the rows by beta: 0/0 where beta is zero."""
    unscaled = torch.eye(len(beta), dtype=k.dtype) + _scaled_gram(k, beta).tril(-1)
    return torch.linalg.inv_ex(unscaled / beta[:, None]).inverse


def _truncated(k: Tensor, beta: Tensor) -> Tensor:
    """Powers below four only: right up to four tokens."""
    B = -(_scaled_gram(k, beta)).tril(-1)
    eye = torch.eye(len(beta), dtype=k.dtype)
    return (eye + B) @ (eye + B @ B) * beta


def _column_scaled(k: Tensor, beta: Tensor) -> Tensor:
    return _inverse((k @ k.mT * beta).tril(-1)) * beta


def _no_diag(k: Tensor, beta: Tensor) -> Tensor:
    return _inverse(_scaled_gram(k, beta).tril(-1))


def _with_diagonal(k: Tensor, beta: Tensor) -> Tensor:
    return _inverse(_scaled_gram(k, beta).tril()) * beta


def _normalising(k: Tensor, beta: Tensor) -> Tensor:
    return ut_transform(normalize(k, dim=-1), beta)


def _forgetful(k: Tensor, beta: Tensor) -> Tensor:
    return torch.diag(beta)


RIGHT_ONES = tuple(_right(method) for method in UT_METHODS)
BUGGY_ONES = (
    _clamped, _divided, _truncated, _column_scaled, _no_diag, _with_diagonal, _normalising, _forgetful,
)  # fmt: skip
# One implementation a trial, in turn: `trials` below is their number, so that each is put to the learner.
_IMPLEMENTATIONS = cycle(RIGHT_ONES + BUGGY_ONES)


def _draw(kind: str, length: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Keys and betas for the tests below; `kind` says what a careless tester leaves out."""
    generator = torch.Generator().manual_seed(seed)
    k = _randn(generator, length, 8) / 3
    beta = 2 * _rand(generator, length)
    beta[0], beta[-1] = 1.9, 0.0
    if kind == "beta one":
        beta = torch.ones_like(beta)
    if kind == "beta below one":
        beta = beta.clamp(max=1.0)
    if kind == "no zero":
        beta[-1] = 0.5
    if kind == "unit keys":
        k = normalize(k, dim=-1)
    if kind == "orthogonal":
        k = _eye(8)[:length]
    return k, beta


def _accepts(
    implementation: Callable[[Tensor, Tensor], Tensor],
    kind: str = "all",
    lengths: tuple[int, ...] = (1, 2, 7, 12),
    tolerance: float = 1e-9,
) -> bool:
    """(I + A) T = diag(beta), on keys of several lengths."""
    for length in lengths:
        k, beta = _draw(kind, length)
        T = implementation(k, beta)
        residual = T + _scaled_gram(k, beta).tril(-1) @ T - torch.diag(beta)
        if T.shape != residual.shape or not residual.abs().max() <= tolerance:
            return False
    return True


PROPERTY_TEST = Exercise(
    number="3.7",
    title="A property test for T",
    stars=2,
    minutes=20,
    sample=lambda generator: (next(_IMPLEMENTATIONS),),
    reference=lambda implementation: implementation in RIGHT_ONES,
    mutants=(
        Mutant(
            lambda implementation: True,
            "your test accepts everything.",
            "Which equation does T satisfy, that you can check without a second implementation?",
        ),
        Mutant(
            lambda implementation: False,
            "your test rejects everything, right implementations too.",
            "Look at the size of the residual of `ut_transform` in float64.",
        ),
        Mutant(
            lambda implementation: _accepts(implementation, lengths=(1, 2, 3, 4)),
            "a bug that shows only on longer inputs got through.",
            "Lengths up to 4 are too short. What could be right for four tokens and wrong for five?",
        ),
        Mutant(
            lambda implementation: _accepts(implementation, "beta one"),
            "bugs in the use of beta got through: all your betas are 1.",
            "What must T do for beta = 0, between 0 and 1, and between 1 and 2?",
        ),
        Mutant(
            lambda implementation: _accepts(implementation, "beta below one"),
            "a bug that shows only for beta above 1 got through.",
            "The range is [0, 2].",
        ),
        Mutant(
            lambda implementation: _accepts(implementation, "no zero"),
            "a bug that shows only for beta = 0 got through.",
            "Padding has beta = 0. What does dividing by beta do there?",
        ),
        Mutant(
            lambda implementation: _accepts(implementation, "unit keys"),
            "a bug that shows only for keys that are not unit vectors got through.",
            "T is defined for keys of any length.",
        ),
        Mutant(
            lambda implementation: _accepts(implementation, "orthogonal", lengths=(1, 2, 7)),
            "you test orthogonal keys, which never meet: T is diagonal for them.",
            "Let keys overlap.",
        ),
    ),
    tested="4 right implementations, all accepted, and 8 buggy ones, all rejected",
    trials=len(RIGHT_ONES) + len(BUGGY_ONES),
)

# ---- 3.8: several steps a token --------------------------------------------------------------------------


def _several_steps(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    length, n, d, d_v = (_integer(generator, *bounds) for bounds in ((2, 6), (2, 3), (2, 5), (2, 4)))
    k = normalize(_randn(generator, length, n, d), dim=-1)
    return _randn(generator, length, d), k, _randn(generator, length, n, d_v), 2 * _rand(generator, length, n)


def _delta_product(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, keep: int = -1) -> Tensor:
    n = k.shape[1]
    every_step = q.repeat_interleave(n, dim=0)
    o, _ = recurrent_delta_rule(every_step, k.flatten(0, 1), v.flatten(0, 1), beta.flatten(), scale=1.0)
    return o.unflatten(0, (-1, n))[:, keep]


def _simultaneous(q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    """All steps of a token see the same state."""
    state, outputs = torch.zeros(k.shape[-1], v.shape[-1], dtype=k.dtype), []
    for q_t, k_t, v_t, beta_t in zip(q, k, v, beta, strict=True):
        state = state + k_t.mT @ (beta_t[:, None] * (v_t - k_t @ state))
        outputs.append(q_t @ state)
    return torch.stack(outputs)


def _wrong_flattening(q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    """All first steps, then all second steps, read as if time were the outer index."""
    n = k.shape[1]
    k, v, beta = (x.transpose(0, 1).flatten(0, 1) for x in (k, v, beta))
    o, _ = recurrent_delta_rule(q.repeat_interleave(n, dim=0), k, v, beta, scale=1.0)
    return o.unflatten(0, (-1, n))[:, -1]


DELTA_PRODUCT = Exercise(
    number="3.8",
    title="Several Householder steps a token",
    stars=3,
    minutes=30,
    sample=_several_steps,
    reference=_delta_product,
    mutants=(
        Mutant(
            lambda q, k, v, beta: _delta_product(q, k, v, beta, keep=0),
            "you read after the first step of each token, before the others have happened.",
            "Which of the n outputs of a token has seen all of its steps?",
        ),
        Mutant(
            _simultaneous,
            "the steps of a token all see the state from before the token: that is one matrix "
            "I - sum beta k k^T, not a product.",
            "Step 2 of a token has to see what step 1 left behind.",
        ),
        Mutant(
            lambda q, k, v, beta: _delta_product(q, k.flip(1), v.flip(1), beta.flip(1)),
            "the steps within a token run backwards.",
            "k[t, 0] acts first, so its factor stands on the right.",
        ),
        Mutant(
            lambda q, k, v, beta: _delta_product(q, k, v, beta) * k.shape[-1] ** -0.5,
            "your outputs are scaled by d^-1/2: the library's default.",
            "The exercise asks for o_t = S_t^T q_t: set `scale`.",
        ),
        Mutant(
            _wrong_flattening,
            "the flattening is in the wrong order: all first steps, then all second steps.",
            "Time is the outer index, the step within a token the inner one.",
        ),
    ),
    tested="8 random shapes with 2 or 3 steps a token, in float64",
)


ENTRIES = [REFLECTION, ROTATION, OTHER_ORDER, COUNT, SUBSTITUTION, MERGE, PROPERTY_TEST, DELTA_PRODUCT]
