"""Chapter 3: products of Householder matrices, the WY representation and the UT transform."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import pi

import torch
from torch import Tensor
from torch.nn.functional import normalize

from dn_lib.forms.delta_rule import recurrent_delta_rule
from dn_lib.forms.householder import UT_METHODS, householder_matrix, scaled_inverse, ut_transform, wy_recursion
from dn_lib.teaching.judge.method import (
    SOLVERS,
    Record,
    Rule,
    no_division,
    no_library,
    no_operations,
    no_second_implementation,
    products,
    through,
)
from dn_lib.teaching.registry import Candidate, Exercise, Extreme, Mutant


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


def _chunk(length: int, d: int = 3, *, beta: float | None = None, equal: bool = False) -> tuple[Tensor, Tensor]:
    """Unit keys and betas of one size: for extremes, and to look at the method."""
    generator = torch.Generator().manual_seed(length)
    k, b = normalize(_randn(generator, length, d), dim=-1), 2 * _rand(generator, length)
    return k[:1].repeat(length, 1) if equal else k, b if beta is None else torch.full_like(b, beta)


# ---- 3.1: a reflection that carries a to b ---------------------------------------------------------------


def _two_vectors(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    d = _integer(generator, 2, 6)
    a, b = _randn(generator, d), _randn(generator, d)
    return a, b * a.norm() / b.norm()


def _reflection(a: Tensor, b: Tensor) -> Tensor:
    k = normalize(a - b, dim=0)
    return _eye(len(a)) - 2 * torch.outer(k, k)


def _opposite(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    a = _randn(generator, 3)
    return a, -a


def _close(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two vectors at an angle of a thousandth: the difference keeps 13 of float64's 16 digits."""
    angle = torch.tensor(1e-3, dtype=torch.float64)
    return 5 * _at(0 * angle), 5 * _at(angle)


REFLECTION = Exercise(
    number="3.1",
    title="A reflection from a to b",
    stars=1,
    minutes=5,
    sample=_two_vectors,
    reference=_reflection,
    mutants=(
        Mutant(
            lambda a, b: _eye(len(a)) - 2 * torch.outer(b - a, b - a) / a.dot(a),
            "k is divided by the length of a, so it is no unit vector.",
            "How long is b - a?",
        ),
        Mutant(
            lambda a, b: _eye(len(a)) + torch.outer(b - a, a) / a.dot(a),
            "your matrix carries a to b, but it is no reflection: it is not symmetric.",
            "Which form has a reflection, and what is k there?",
        ),
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
            lambda a, b: householder_matrix(normalize(a, dim=0), 2.0),
            "your key lies along a: the matrix turns a into -a.",
            "In which direction does a have to move to get to b?",
        ),
        Mutant(
            lambda a, b: householder_matrix(normalize(b, dim=0), 2.0),
            "your key lies along b: the mirror is across b, whatever a is.",
            "In which direction does a have to move to get to b?",
        ),
        Mutant(
            lambda a, b: _eye(len(a)) - 2 * torch.outer(a - b, a - b) / (a - b).norm(),
            "you divided by the length of a - b once; k occurs twice, so that your k is not a unit vector.",
            "How many times does k enter k k^T?",
        ),
        Mutant(
            lambda a, b: normalize(a - b, dim=0),
            "this is the key itself; asked for is the matrix made from it.",
            "The task says which matrix: I - 2 k k^T.",
        ),
        Mutant(
            lambda a, b: torch.outer(b, a) / (a @ a),
            "it does carry a to b, but it forgets everything else: its rank is one.",
            "Start from I - beta k k^T, and find k and beta.",
        ),
    ),
    tested="8 pairs of vectors of equal length, in 2 to 6 dimensions, in float64",
    extremes=(
        Extreme("b = -a", _opposite, "Then a itself is orthogonal to the mirror."),
        Extreme("a and b close to each other", _close, "Their difference is short, and still gives the direction."),
    ),
)

# ---- 3.2: two reflections make a rotation ----------------------------------------------------------------


def _at(angle: Tensor) -> Tensor:
    return torch.stack([angle.cos(), angle.sin()])


def _keys_for_rotation(theta: Tensor, share: float = 0.5, sign: float = 1.0) -> Tensor:
    return torch.stack([_at(0 * theta), _at(sign * share * theta)])


def _has_reflections(record: Record) -> str:
    """A matrix on the way that is symmetric, orthogonal and turns the plane over: the factor of such a product."""
    for operation in record.operations:
        for x in operation.outputs:
            if x.shape != (2, 2) or not x.is_floating_point():
                continue
            orthogonal = torch.allclose(x @ x.T, torch.eye(2, dtype=x.dtype))
            if orthogonal and torch.allclose(x, x.T) and x[0, 0] * x[1, 1] < x[0, 1] * x[1, 0]:
                return ""
    return "has no reflection on the way: the rotation was written down"


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
    extremes=(
        Extreme("theta = 0", lambda generator: (torch.zeros((), dtype=torch.float64),), "Then the keys are equal."),
        Extreme(
            "theta = pi", lambda generator: (torch.tensor(pi, dtype=torch.float64),), "Then the keys are orthogonal."
        ),
    ),
    rules=(
        Rule(
            lambda: ((torch.tensor(0.7, dtype=torch.float64),),),
            _has_reflections,
            "Choose two keys, form I - 2 k k^T for each, and multiply.",
        ),
    ),
    mutants=(
        Mutant(
            lambda theta: _eye(2) - 2 * torch.outer(_at(theta / 2), _at(theta / 2)),
            "this is one reflection, which turns the plane over; a rotation takes two.",
            "The determinant of a rotation is 1. What is that of a reflection?",
        ),
        Mutant(
            lambda theta: householder_matrix(_at(theta / 2), 1.0) @ householder_matrix(_at(0 * theta), 1.0),
            "your factors project: with beta = 1 each loses a dimension.",
            "Which beta reflects?",
        ),
        Mutant(
            lambda theta: _rotation(theta, share=0.25),
            "it turns by theta / 2: the angle between your keys is too small by half.",
            "Follow the first key through both reflections, and measure how far it went.",
        ),
        Mutant(
            lambda theta: _rotation(torch.deg2rad(theta)),
            "you take theta for degrees; it is in radians.",
            "What does `torch.cos` expect?",
        ),
        Mutant(
            lambda theta: householder_matrix(_at(theta / 2), 2.0) + householder_matrix(_at(0 * theta), 2.0),
            "you took the sum of the two matrices; one step after the other is their product.",
            "H_2 acts on what H_1 returns.",
        ),
        Mutant(
            lambda theta: _rotation(theta, share=1.0),
            "it turns by 2 theta: the angle between the keys is not the angle of the rotation.",
            "Follow the first key through both reflections, and measure how far it went.",
        ),
        Mutant(
            lambda theta: _rotation(theta, sign=-1.0),
            "it turns clockwise: this is the inverse rotation, as it comes from the two factors in the other order.",
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


def _right_factor(k: Tensor, w: Tensor) -> Tensor:
    return _eye(k.shape[-1]) - w.mT @ k


def _with_w(k: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    return k, wy_recursion(k, beta)


def _keys_and_w(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    k, beta = _keys(generator)
    return k, wy_recursion(k, beta)


OTHER_ORDER = Exercise(
    number="3.3",
    title="The product in the other order",
    stars=1,
    minutes=5,
    sample=_keys_and_w,
    reference=_right_factor,
    mutants=(
        Mutant(
            lambda k, w: _eye(k.shape[-1]) - k.mT @ w,
            "this is H_L ... H_1, the newest factor on the left.",
            "What does transposing do to a product of symmetric matrices?",
        ),
        Mutant(
            lambda k, w: _eye(k.shape[-1]) - k.mT @ k,
            "you used k twice and no w: w holds what the steps do to each other.",
            "Look at the product of all steps in terms of K and W, and transpose it.",
        ),
        Mutant(
            lambda k, w: _eye(k.shape[-1]) - w.mT @ w,
            "you used w twice and no k: each term has one of both.",
            "Look at the product of all steps in terms of K and W, and transpose it.",
        ),
        Mutant(
            lambda k, w: -w.mT @ k,
            "the identity is missing: what the keys do not touch stays.",
            "What does the product do to a direction orthogonal to all keys?",
        ),
        Mutant(
            lambda k, w: w.mT @ k,
            "the identity is missing, and the sign: this is what the steps remove.",
            "What does the product do to a direction orthogonal to all keys?",
        ),
        Mutant(
            lambda k, w: _eye(k.shape[-1]) - 2 * w.mT @ k,
            "there is a 2 too many: beta is in w already.",
            "Try a single factor with w_1 = beta_1 k_1.",
        ),
        Mutant(
            lambda k, w: _eye(k.shape[-1]) - k.flip(0).mT @ w,
            "you reversed the keys and not w: each row of w belongs to the key of the same token.",
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
    extremes=(
        Extreme("one factor", lambda generator: _with_w(*_chunk(1)), "One H is symmetric: both orders are the same."),
        Extreme("beta = 2", lambda generator: _with_w(*_chunk(4, beta=2.0)), "Then every factor reflects."),
    ),
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
            lambda length: length * (length - 1) * (2 * length - 1) // 12,
            "you halve the count with the zeros. A triangle with its diagonal is more than half of its square.",
            "How many numbers does a triangle of i rows hold, the diagonal included?",
        ),
        Mutant(
            lambda length: sum((length - g) * (g + 1) for g in range(1, length)),
            "one product too many for each entry: m runs up to i - 1, and not to i.",
            "Entry (1, 0) takes a single product. Which one?",
        ),
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
            lambda length: length**2 * (length - 1) // 2,
            "you give every column of T all the products of a full one: above the diagonal it has zeros.",
            "T_mj is zero for m < j: where does the sum over m start?",
        ),
        Mutant(
            lambda length: length * (length - 1) * (length - 2) // 6,
            "you count one product too few for each entry: m = j is among them.",
            "Write out the sum for entry (2, 1), and for (3, 1).",
        ),
        Mutant(
            lambda length: length**3 // 6,
            "this is about right, the leading term; the exact count was asked for.",
            "Write out the sum for C = 2 and for C = 3.",
        ),
        Mutant(
            lambda length: length**3 // 3,
            "about twice too many, and only a leading term: the exact count was asked for.",
            "Both matrices are triangular. Count for one entry (i, j), then sum over i > j.",
        ),
        Mutant(
            lambda length: length**3,
            "this is a product of two full matrices.",
            "Both matrices are triangular. Count for one entry (i, j), then sum over i > j.",
        ),
        Mutant(
            lambda length: length * (length + 1) * (length + 2) // 6,
            "you count one product too many for each entry, the diagonal's included: as if beta_i were counted.",
            "Write out the sum for entry (2, 1), and for (3, 1). What is not counted, says the task?",
        ),
    ),
    tested="8 sizes between 4 and 200, exactly",
    extremes=(
        Extreme("C = 1", lambda generator: (1,), "One token needs no product at all."),
        Extreme("C = 2", lambda generator: (2,), "Two tokens need one: entry (2, 1) has the single term m = 1."),
    ),
)

# ---- 3.5: forward substitution ---------------------------------------------------------------------------


def _substitute(
    A: Tensor, beta: Tensor, start: Callable[[int], Tensor], before: Callable[[int, list[Tensor]], Tensor]
) -> Tensor:
    rows: list[Tensor] = []
    for i in range(len(beta)):
        rows.append(start(i) - sum((A[i, j] * before(j, rows) for j in range(i)), 0 * beta))
    return torch.stack(rows)


def _row_by_row(k: Tensor, beta: Tensor) -> Tensor:
    return _substitute(_scaled_gram(k, beta), beta, lambda i: beta[i] * _unit(beta, i), lambda j, rows: rows[j])


def _row_above_only(k: Tensor, beta: Tensor) -> Tensor:
    A, rows = _scaled_gram(k, beta), [beta[0] * _unit(beta, 0)]
    for i in range(1, len(beta)):
        rows.append(beta[i] * _unit(beta, i) - A[i, i - 1] * rows[-1])
    return torch.stack(rows)


def _multiplies_full_matrices(record: Record) -> str:
    square = (12, 12)
    if any(left == right == square for _, left, right in products(record)):
        return "multiplies full L x L matrices with each other, as for a series of powers"
    return ""


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
    reference=_row_by_row,
    extremes=(
        Extreme("one token", lambda generator: _chunk(1), "T is then a single number."),
        Extreme(
            "beta = 0", lambda generator: _chunk(5, beta=0.0), "Padding has beta = 0: nothing may be divided by it."
        ),
        Extreme(
            "beta = 2", lambda generator: _chunk(5, beta=2.0), "T has entries of both signs then, and no bound of 1."
        ),
        Extreme("equal keys", lambda generator: _chunk(5, equal=True), "Then every write sees all earlier ones."),
    ),
    rules=(
        no_library(
            lambda: _chunk(12), hint="You are writing what the library's function does: rows, one after another."
        ),
        no_operations(
            lambda: _chunk(12), SOLVERS, "The task is to write the solver. Row i needs the rows above it only."
        ),
        Rule(
            lambda: (_chunk(12),),
            _multiplies_full_matrices,
            "Substitution needs one product of a vector with a matrix per row. Use the rows that are finished.",
        ),
        no_division(
            lambda: _chunk(12, beta=0.0),
            "beta",
            "It comes out right here by luck; a gradient would not. Multiply by beta.",
        ),
    ),
    mutants=(
        Mutant(
            lambda k, beta: _substitute(k @ k.mT, beta, lambda i: beta[i] * _unit(beta, i), lambda j, rows: rows[j]),
            "beta_i scales your diagonal, but not the sum: the whole bracket is multiplied by it.",
            "In u_i = beta_i (...), what stands inside the bracket?",
        ),
        Mutant(
            lambda k, beta: torch.linalg.inv(_eye(len(k)) + _scaled_gram(k, beta).tril()) * beta,
            "the diagonal of A takes part: token i subtracts its own write.",
            "Where does the sum over earlier rows end?",
        ),
        Mutant(
            _row_above_only,
            "each row uses the one before it only: writes further back are not subtracted.",
            "How many finished rows does row i need?",
        ),
        Mutant(
            lambda k, beta: scaled_inverse(k, beta),
            "this is N, what T has between the two diagonal matrices, and not T.",
            "T = D + D N D. What is on the diagonal of T?",
        ),
        Mutant(
            lambda k, beta: torch.diag(beta),
            "nothing is subtracted: your T is diagonal, as if no key met another.",
            "What does the error of token i owe to the tokens before it?",
        ),
        Mutant(
            lambda k, beta: _substitute(
                beta[:, None] * _scaled_gram(k, beta),
                beta,
                lambda i: beta[i] ** 2 * _unit(beta, i),
                lambda j, rows: rows[j],
            ),
            "beta_i comes in twice: once in the row of A and once more around it.",
            "Compare your diagonal with beta.",
        ),
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


def _split(k: Tensor, beta: Tensor, at: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    first, second = (k[:at], beta[:at]), (k[at:], beta[at:])
    return scaled_inverse(*first), scaled_inverse(*second), k[at:] @ k[:at].mT, beta[:at], beta[at:]


def _merge(N11: Tensor, N22: Tensor, B21: Tensor, beta1: Tensor, beta2: Tensor) -> Tensor:
    left = B21 + N22 @ (beta2[:, None] * B21)
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
            lambda N11, N22, B21, beta1, beta2: -_merge(N11, N22, B21, beta1, beta2),
            "the sign: N begins with -B.",
            "Take blocks of size one, where N_11 = N_22 = 0.",
        ),
        Mutant(
            lambda N11, N22, B21, beta1, beta2: -(B21 + N22 @ (beta2[:, None] * B21)),
            "the bracket on the right is missing: no path goes through the first block, N_11.",
            "A chain may begin inside the first block before it crosses to the second.",
        ),
        Mutant(
            lambda N11, N22, B21, beta1, beta2: -(B21 + B21 @ (beta1[:, None] * N11)),
            "the bracket on the left is missing: no path goes through the second block, N_22.",
            "A chain may go on inside the second block after it has crossed.",
        ),
        Mutant(
            lambda N11, N22, B21, beta1, beta2: -B21,
            "both brackets are missing: only the direct step from block to block is there.",
            "A chain may pass through several tokens of each block.",
        ),
        Mutant(
            lambda N11, N22, B21, beta1, beta2: -(N22 @ (beta2[:, None] * B21) @ (beta1[:, None] * N11)),
            "the identity is missing in both brackets: a chain need not pass through both blocks.",
            "Multiply the two brackets out. How many terms are there?",
        ),
        Mutant(
            lambda N11, N22, B21, beta1, beta2: (
                -(B21 + N22 @ (beta2[:, None] * B21)) @ (_eye(len(beta1)) + N11 * beta1)
            ),
            "D_1 stands on the wrong side: it scales the columns of N_11, and should scale the rows.",
            "D_1 N_11: what does a diagonal matrix do from the left?",
        ),
        Mutant(
            lambda N11, N22, B21, beta1, beta2: (
                -(_eye(len(beta2)) + beta2[:, None] * N22) @ (B21 + B21 @ (beta1[:, None] * N11))
            ),
            "D_2 stands on the wrong side: it scales the rows of N_22, and should scale the columns.",
            "N_22 D_2: what does a diagonal matrix do from the right?",
        ),
        Mutant(
            lambda N11, N22, B21, beta1, beta2: _merge(N11, N22, B21, torch.ones_like(beta1), beta2),
            "D_1 is missing: the betas of the first block are nowhere in your formula.",
            "The betas in a chain belong to the writes in the middle. Which of them lie in the first block?",
        ),
        Mutant(
            lambda N11, N22, B21, beta1, beta2: _merge(N11, N22, B21, beta1, torch.ones_like(beta2)),
            "D_2 is missing: the betas of the second block are nowhere in your formula.",
            "The betas in a chain belong to the writes in the middle. Which of them lie in the second block?",
        ),
        Mutant(
            lambda N11, N22, B21, beta1, beta2: (
                -(torch.diag(beta2) + beta2[:, None] * N22 * beta2)
                @ B21
                @ (torch.diag(beta1) + beta1[:, None] * N11 * beta1)
            ),
            "this is the block of T: it has the betas of both ends, which N leaves out.",
            "T = D + D N D takes the betas at the two ends. Those in the middle are left to N.",
        ),
        Mutant(
            lambda N11, N22, B21, beta1, beta2: _merge(N11.mT, N22.mT, B21, beta1, beta2),
            "your blocks are transposed: scaling a row is not scaling a column.",
            "N is lower triangular. Which index of N_22 does D_2 scale?",
        ),
        Mutant(
            lambda N11, N22, B21, beta1, beta2: (
                -(B21 + beta2[:, None] * (N22 @ B21) + (B21 + beta2[:, None] * (N22 @ B21)) @ (N11 * beta1))
            ),
            "D stands outside of N: you scale the reader of N_22 and the writer of N_11.",
            "The betas in a chain belong to the writes in the middle, between B_21 and the two blocks.",
        ),
        Mutant(
            lambda N11, N22, B21, beta1, beta2: -(B21 + N22 @ (beta2[:, None] * B21) + B21 @ (beta1[:, None] * N11)),
            "paths that go through both blocks are missing: N_22 D_2 B_21 D_1 N_11.",
            "Multiply the two brackets out. How many terms are there?",
        ),
        Mutant(
            lambda N11, N22, B21, beta1, beta2: _merge(N11, N22, B21, torch.ones_like(beta1), torch.ones_like(beta2)),
            "your betas are all 1: they are nowhere in the formula.",
            "T = D + D N D takes the betas at the two ends. Those in the middle are left to N.",
        ),
    ),
    tested="8 pairs of blocks of different sizes, in float64",
    extremes=(
        Extreme("blocks of one token", lambda generator: _split(*_chunk(2), 1), "Then N_11 = N_22 = 0."),
        Extreme(
            "beta = 0", lambda generator: _split(*_chunk(5, beta=0.0), 2), "Then N = -B, and nothing may be divided."
        ),
        Extreme("beta = 2", lambda generator: _split(*_chunk(5, beta=2.0), 2), "Every path counts at its full weight."),
    ),
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


_ROUNDING = "Look at the size of the residual of `ut_transform` in float64: no equality holds to the last bit."
CANDIDATES = (
    *(
        Candidate(_right(method), f"`ut_transform` by {method}, with a rounding of its own", _ROUNDING, right=True)
        for method in UT_METHODS
    ),
    Candidate(_clamped, "beta is cut off at 1", "The range is [0, 2]: try beta above 1."),
    Candidate(
        _divided,
        "the rows are divided by beta, which is 0/0 at beta = 0",
        "Padding has beta = 0. And NaN compares false.",
    ),
    Candidate(
        _truncated,
        "the series of powers stops after four terms",
        "What could be right for four tokens and wrong for five?",
    ),
    Candidate(
        _column_scaled, "beta scales the columns of A, not its rows", "Use betas that differ from token to token."
    ),
    Candidate(_no_diag, "the last factor, diag(beta), is missing", "For which betas is that factor the identity?"),
    Candidate(
        _with_diagonal, "the diagonal of A is left in", "Which equation does T satisfy, and with which triangle?"
    ),
    Candidate(
        _normalising, "keys are normalised, so that their length does not count", "T is defined for keys of any length."
    ),
    Candidate(_forgetful, "T is diagonal, as if no key met another", "Let keys overlap."),
)


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
    sample=lambda generator: (),
    reference=_accepts,
    candidates=CANDIDATES,
    rules=(no_second_implementation(ut_transform, "T", "Which product with T do you know without knowing T?"),),
    mutants=(
        Mutant(
            lambda implementation: True,
            "Your test accepts everything that it was shown; all 8 bugs get through:",
            "The range is [0, 2]: try beta above 1.",
        ),
        Mutant(
            lambda implementation: False,
            "Your test rejects everything that it was shown, the 4 right implementations too.",
            _ROUNDING,
        ),
        Mutant(
            partial(_accepts, lengths=(1, 2, 3, 4)),
            "gets through: the series of powers stops after four terms",
            "What could be right for four tokens and wrong for five?",
        ),
        Mutant(
            partial(_accepts, kind="beta one"),
            "gets through: the last factor, diag(beta), is missing",
            "The range is [0, 2]: try beta above 1.",
        ),
        Mutant(
            partial(_accepts, kind="beta below one"),
            "gets through: beta is cut off at 1",
            "The range is [0, 2]: try beta above 1.",
        ),
        Mutant(
            partial(_accepts, kind="no zero"),
            "gets through: the rows are divided by beta, which is 0/0 at beta = 0",
            "Padding has beta = 0. And NaN compares false.",
        ),
        Mutant(
            partial(_accepts, kind="unit keys"),
            "gets through: keys are normalised",
            "T is defined for keys of any length.",
        ),
        Mutant(
            partial(_accepts, kind="orthogonal", lengths=(1, 2, 7)),
            "gets through: T is diagonal",
            "What could be right for four tokens and wrong for five?",
        ),
    ),
    tested="4 right implementations, all accepted, and 8 buggy ones, all rejected",
)

# ---- 3.8: several steps per token ----------------------------------------------------------------------------


def _several_steps(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    length, n, d, d_v = (_integer(generator, *bounds) for bounds in ((2, 6), (2, 3), (2, 5), (2, 4)))
    k = normalize(_randn(generator, length, n, d), dim=-1)
    return _randn(generator, length, d), k, _randn(generator, length, n, d_v), 2 * _rand(generator, length, n)


def _step_inputs(length: int, n: int, *, beta: float | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(length)
    k, b = _chunk(length * n, beta=beta)
    steps = k.unflatten(0, (length, n)), _randn(generator, length, n, 4), b.unflatten(0, (length, n))
    return _randn(generator, length, 3), *steps


def _repeated_queries(q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    n = k.shape[1]
    return recurrent_delta_rule(q.repeat(n, 1), k.flatten(0, 1), v.flatten(0, 1), beta.flatten(), scale=1.0)[0][
        n - 1 :: n
    ]


def _delta_product(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, keep: int | str = -1) -> Tensor:
    n = k.shape[1]
    every_step = q.repeat_interleave(n, dim=0)
    o, _ = recurrent_delta_rule(every_step, k.flatten(0, 1), v.flatten(0, 1), beta.flatten(), scale=1.0)
    if keep == "all":
        return o
    of_tokens = o.unflatten(0, (-1, n))
    if isinstance(keep, int):
        return of_tokens[:, keep]
    return of_tokens.sum(1) if keep == "sum" else of_tokens.mean(1)


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


def _rounds_of_tokens(q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    """All first steps, then all second steps, read in the last round."""
    n = k.shape[1]
    k, v, beta = (x.transpose(0, 1).flatten(0, 1) for x in (k, v, beta))
    return recurrent_delta_rule(q.repeat(n, 1), k, v, beta, scale=1.0)[0][-len(q) :]


DELTA_PRODUCT = Exercise(
    number="3.8",
    title="Several Householder steps per token",
    stars=3,
    minutes=30,
    sample=_several_steps,
    reference=_delta_product,
    mutants=(
        Mutant(
            lambda q, k, v, beta: _delta_product(q, k, v, beta, keep="sum"),
            "you sum what is read after every step of a token; asked for is what is read after the last.",
            "Which of the n outputs of a token has seen all of its steps?",
        ),
        Mutant(
            _rounds_of_tokens,
            "all tokens take their first step, then all their second: a token's later steps wait for other tokens.",
            "Which steps come before the first step of token 2?",
        ),
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
            _repeated_queries,
            "each query stands beside steps of another token: the sequence of queries is repeated as a whole.",
            "Which query has to be there when the last step of token t is done?",
        ),
        Mutant(
            lambda q, k, v, beta: _delta_product(q, k, v, beta, keep="all"),
            "you return the outputs after every step; asked for is one for each token.",
            "Which of the n outputs of a token has seen all of its steps?",
        ),
        Mutant(
            lambda q, k, v, beta: _delta_product(q, k, v, beta, keep="mean"),
            "you take the mean over the steps of a token; only the last of them has seen them all.",
            "Which of the n outputs of a token has seen all of its steps?",
        ),
        Mutant(
            lambda q, k, v, beta: recurrent_delta_rule(q, k.sum(1), v.sum(1), beta.sum(1), scale=1.0)[0],
            "the steps of a token are added up into one step, with the sum of the keys.",
            "n factors H, one after the other: how many steps is that for L tokens?",
        ),
        Mutant(
            _wrong_flattening,
            "the flattening is in the wrong order: all first steps, then all second steps.",
            "Time is the outer index, the step within a token the inner one.",
        ),
    ),
    tested="8 random shapes with 2 or 3 steps per token, in float64",
    extremes=(
        Extreme("one step per token", lambda generator: _step_inputs(5, 1), "Then it is the plain delta rule."),
        Extreme("one token", lambda generator: _step_inputs(1, 3), "A sequence may be one token long."),
        Extreme("beta = 2", lambda generator: _step_inputs(4, 2, beta=2.0), "Then every step reflects."),
    ),
    rules=(
        through(
            lambda: _step_inputs(5, 2),
            "recurrent_delta_rule",
            "Which sequence, handed to the library's recurrence, has all these steps in their order?",
        ),
    ),
)


ENTRIES = [REFLECTION, ROTATION, OTHER_ORDER, COUNT, SUBSTITUTION, MERGE, PROPERTY_TEST, DELTA_PRODUCT]
