"""Study 2: permutations and rotations from delta steps, how few they can be, least squares one token at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from dn_lib.forms.delta_product import fewest_steps, permutation_steps, token_matrix
from dn_lib.forms.delta_rule import recurrent_delta_rule
from dn_lib.forms.dplr import recurrent_dplr
from dn_lib.forms.least_squares import recursive_least_squares
from dn_lib.teaching.judge.method import Record, Rule, through
from dn_lib.teaching.registry import Exercise, Extreme, Mutant

DOUBLE = torch.float64


def _randn(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=DOUBLE)


def _rand(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(shape, generator=generator, dtype=DOUBLE)


def _integer(generator: torch.Generator, low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, (), generator=generator))


def _eye(d: int) -> Tensor:
    return torch.eye(d, dtype=DOUBLE)


# ---- S2.1: a cycle from swaps ----------------------------------------------------------------------------


def _cycle_inputs(generator: torch.Generator, low: int = 3, high: int = 6) -> tuple[Tensor]:
    return (_randn(generator, _integer(generator, low, high), _integer(generator, 1, 3)),)


def _cycle_keys(d: int, *, sign: float = -1.0, size: float = 0.5**0.5, wrap: bool = False) -> Tensor:
    """Swaps of neighbours from the last pair to the first: row i goes to i + 1, the last to the first."""
    count = d if wrap else d - 1
    k = torch.zeros(count, d, dtype=DOUBLE)
    for n, i in enumerate(range(count - 1, -1, -1)):
        k[n, i], k[n, (i + 1) % d] = size, sign * size
    return k


def _moved(x: Tensor, k: Tensor, beta: float = 2.0) -> Tensor:
    betas = torch.full((len(k),), beta, dtype=x.dtype)
    return recurrent_delta_rule(k, k, k.new_zeros(len(k), x.shape[1]), betas, initial_state=x)[1]


CYCLE = Exercise(
    number="S2.1",
    title="Everyone moves up one",
    stars=1,
    minutes=12,
    sample=_cycle_inputs,
    reference=lambda x: _moved(x, _cycle_keys(len(x))),
    rules=(
        through(
            lambda: _cycle_inputs(torch.Generator().manual_seed(0), 5, 5),
            "recurrent_delta_rule",
            "Make the keys of all steps, then call it once with the rows as `initial_state`.",
        ),
    ),
    extremes=(
        Extreme("two rows", lambda generator: (_randn(generator, 2, 3),), "Then it is one swap."),
        Extreme("a single row", lambda generator: (_randn(generator, 1, 2),), "Then there is nothing to do."),
    ),
    mutants=(
        Mutant(
            lambda x: _moved(x, _cycle_keys(len(x)).flip(0)),
            "your rows move the other way: row 1 comes to the end, and all others move down one.",
            "Follow the last row through your swaps. Which of them acts first?",
        ),
        Mutant(
            lambda x: _moved(x, _cycle_keys(len(x), sign=1.0)),
            "your keys are e_i + e_j: such a reflection swaps two rows and turns the sign of both.",
            "Which direction does a swap turn round, and which does it leave?",
        ),
        Mutant(
            lambda x: _moved(x, _cycle_keys(len(x)), 1.0),
            "with beta = 1 a step puts the mean of two rows into both.",
            "Which beta reflects?",
        ),
        Mutant(
            lambda x: _moved(x, _cycle_keys(len(x), size=1.0)),
            "beta |k|^2 is 4 here: e_i - e_j is not a unit vector.",
            "How long is e_i - e_j?",
        ),
        Mutant(
            lambda x: _moved(x, _cycle_keys(len(x), wrap=True)),
            "that is one swap too many: d swaps cannot make a cycle of d rows.",
            "A swap turns the handedness over. How many does the cycle of three rows take?",
        ),
        Mutant(
            lambda x: _moved(x, _cycle_keys(len(x))[:1]),
            "this is one swap, of the last two rows.",
            "What is left to do after it?",
        ),
    ),
    tested="8 draws of 3 to 6 rows, in float64",
)

# ---- S2.2: how few steps ---------------------------------------------------------------------------------


def _reflections(generator: torch.Generator) -> tuple[Tensor]:
    d = _integer(generator, 3, 6)
    steps = _integer(generator, 1, d)
    k = normalize(_randn(generator, steps, d), dim=-1)
    return (token_matrix(k, torch.full((steps,), 2.0, dtype=DOUBLE)),)


def _shuffled(generator: torch.Generator) -> tuple[Tensor]:
    k, beta = permutation_steps(torch.randperm(6, generator=generator))
    return (token_matrix(k, beta),)


def _blocks(M: Tensor) -> int:
    """Directions that are turned round, and planes that are turned."""
    values = torch.linalg.eigvals(M)
    return int(((values.real < -0.999) & (values.imag.abs() < 1e-6)).sum()) + int((values.imag > 1e-6).sum())


def _number(x: Any) -> Tensor:
    return torch.as_tensor(x, dtype=DOUBLE)


FEWEST = Exercise(
    number="S2.2",
    title="How many steps does it take?",
    stars=1,
    minutes=10,
    sample=_reflections,
    reference=lambda M: _number(int(fewest_steps(M))),
    extremes=(
        Extreme("the identity", lambda generator: (_eye(4),), "Nothing has to be done."),
        Extreme("minus the identity", lambda generator: (-_eye(4),), "What does one reflection turn round?"),
        Extreme("a permutation", _shuffled, "Count its cycles."),
        Extreme("a half turn", lambda generator: (torch.diag(_number([-1.0, -1.0, 1.0])),), "Which directions move?"),
    ),
    mutants=(
        Mutant(
            lambda M: _number(int(torch.linalg.matrix_rank(M))),
            "that is the rank of M, which is d for every matrix that has an inverse; fewer steps may do.",
            "What does one step add to the identity?",
        ),
        Mutant(
            lambda M: _number(int((torch.linalg.eigvals(M).real < -0.999).sum())),
            "you count eigenvalues of -1; a rotation has none of them and still takes two steps.",
            "Which vectors does M leave where they are?",
        ),
        Mutant(
            lambda M: _number(1 if torch.linalg.det(M) < 0 else 2),
            "the determinant tells an odd number of reflections from an even one, and no more.",
            "Think of minus the identity in four dimensions.",
        ),
        Mutant(
            lambda M: _number(len(M) - int(torch.linalg.matrix_rank(M - _eye(len(M)), atol=1e-8))),
            "this counts the directions that M leaves alone.",
            "Steps are for what changes.",
        ),
        Mutant(
            lambda M: _number(_blocks(M)),
            "you count a plane that is turned as one step; a turn takes two reflections.",
            "What is the determinant of a turn?",
        ),
    ),
    tested="8 products of 1 to 6 reflections in 3 to 6 dimensions",
)

# ---- S2.3: a turn in space -------------------------------------------------------------------------------


def _turn(axis: Tensor, angle: Tensor) -> Tensor:
    x, y, z = axis.tolist()
    cross = torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]], dtype=DOUBLE)
    return _eye(3) + angle.sin() * cross + (1 - angle.cos()) * cross @ cross


def _two_keys(axis: Tensor, angle: Tensor, share: float = 0.5, sign: float = 1.0) -> Tensor:
    far = _eye(3)[axis.abs().argmin()]
    first = normalize(far - axis * (axis @ far), dim=0)
    across = torch.linalg.cross(axis, first)
    return torch.stack([first, (share * angle).cos() * first + sign * (share * angle).sin() * across])


def _product(axis: Tensor, angle: Tensor, beta: float = 2.0, **keys: float) -> Tensor:
    k = _two_keys(axis, angle, **keys)
    return token_matrix(k, torch.full((2,), beta, dtype=DOUBLE))


def _has_reflection(record: Record) -> str:
    """A key of length 1 orthogonal to the axis does not show; its reflection, symmetric with trace 1, does."""
    for operation in record.operations:
        for x in operation.outputs:
            if x.shape[-2:] != (3, 3) or not x.is_floating_point():
                continue
            for matrix in x.reshape(-1, 3, 3):
                same = torch.allclose(matrix, matrix.T) and torch.allclose(matrix @ matrix, _eye(3).to(matrix))
                if same and abs(matrix.trace().item() - 1) < 1e-6:
                    return ""
    return "has no reflection on the way: the turn was written down"


TURN = Exercise(
    number="S2.3",
    title="A turn in space from two steps",
    stars=2,
    minutes=20,
    sample=lambda g: (normalize(_randn(g, 3), dim=0), 0.2 + 2.5 * _rand(g, 1)[0]),
    reference=_product,
    rules=(
        Rule(
            lambda: ((normalize(_number([1.0, 2.0, 2.0]), dim=0), _number(0.7)),),
            _has_reflection,
            "Choose two keys, form I - 2 k k^T for each, and multiply.",
        ),
    ),
    extremes=(
        Extreme("an axis of space", lambda g: (_eye(3)[2], _number(1.0)), "Then it is a turn of the plane."),
        Extreme("angle = 0", lambda g: (_eye(3)[0], _number(0.0)), "Then the keys are equal."),
        Extreme("angle = pi", lambda g: (_eye(3)[1], _number(torch.pi)), "Then the keys are orthogonal."),
    ),
    mutants=(
        Mutant(
            lambda axis, angle: _product(axis, angle, share=1.0),
            "it turns by twice the angle: two mirrors turn by twice the angle between them.",
            "Follow the first key through both reflections.",
        ),
        Mutant(
            lambda axis, angle: _product(axis, angle, sign=-1.0),
            "it turns the other way.",
            "The step that acts first stands on the right.",
        ),
        Mutant(
            lambda axis, angle: _eye(3) - 2 * torch.outer(axis, axis),
            "this reflects along the axis; the axis is what a turn leaves alone.",
            "To which vectors are both keys orthogonal?",
        ),
        Mutant(
            lambda axis, angle: _product(axis, angle, beta=1.0),
            "your steps project: with beta = 1 each loses a direction.",
            "Which beta reflects?",
        ),
        Mutant(
            lambda axis, angle: _eye(3) - 2 * torch.outer(*_two_keys(axis, angle)[[1, 1]]),
            "this is one reflection: its determinant is -1, that of a turn is 1.",
            "How many reflections bring the handedness back?",
        ),
        Mutant(
            lambda axis, angle: 2 * torch.outer(axis, axis) - _eye(3),
            "this is a half turn, whatever the angle is.",
            "The angle between your keys has to depend on it.",
        ),
        Mutant(
            lambda axis, angle: _product(axis, torch.deg2rad(angle)),
            "you take the angle for degrees; it is in radians.",
            "What does `torch.cos` expect?",
        ),
    ),
    tested="8 axes and angles, in float64",
)

# ---- S2.4: least squares one token at a time -------------------------------------------------------------


def _step_inputs(generator: torch.Generator) -> tuple[Tensor, ...]:
    d_k, d_v = _integer(generator, 2, 5), _integer(generator, 1, 4)
    A = _randn(generator, d_k, d_k)
    P = torch.linalg.inv(A @ A.T + 0.5 * _eye(d_k))
    beta = 0.2 + _rand(generator, 1)[0]
    return _randn(generator, d_k), _randn(generator, d_v), beta, _randn(generator, d_k, d_v), (P + P.T) / 2


def _squares_step(k, v, beta, S, P, *, gain="new", weigh=True, after=True, sign=1.0, error="old"):
    Pk = P @ k
    # `new` is P after the token, times k and beta.
    new = (beta if weigh else 1.0) * Pk / (1 + (beta if weigh else 1.0) * (k @ Pk))
    h = {"new": new, "old": beta * Pk, "identity": beta * k}[gain]
    P_after = P - torch.outer(new, Pk) if after else P
    e = v - S.T @ k if error == "old" else v
    return S + sign * torch.outer(h, e), P_after


SQUARES = Exercise(
    number="S2.4",
    title="One token of least squares",
    stars=2,
    minutes=20,
    sample=_step_inputs,
    reference=_squares_step,
    outputs=("S", "P"),
    keeps_inputs=True,
    extremes=(
        Extreme(
            "beta = 0",
            lambda g: (*(x := _step_inputs(g))[:2], _number(0.0), *x[3:]),
            "A token without weight changes nothing. Do you divide by beta?",
        ),
        Extreme(
            "k = 0",
            lambda g: (torch.zeros_like((x := _step_inputs(g))[0]), *x[1:]),
            "Then nothing is learned of any direction.",
        ),
    ),
    mutants=(
        Mutant(
            lambda *x: _squares_step(*x, gain="identity"),
            "your gain is beta k, as if P were the identity: this is the delta rule.",
            "In which directions has the memory seen much already, and who knows it?",
        ),
        Mutant(
            lambda *x: _squares_step(*x, gain="old"),
            "your gain uses P from before the token.",
            "The state after the token is best for all tokens, this one included.",
        ),
        Mutant(
            lambda *x: _squares_step(*x, after=False),
            "P is returned as it came: the memory does not learn what it has seen.",
            "P is the inverse of a sum that has just got a term more.",
        ),
        Mutant(
            lambda *x: _squares_step(*x, weigh=False),
            "beta is missing: every token weighs the same.",
            "The term of this token in the sum is beta k k^T.",
        ),
        Mutant(
            lambda *x: _squares_step(*x, error="none"),
            "v is written, not the error: what the memory already answers is written again.",
            "Compare with the delta rule.",
        ),
        Mutant(
            lambda *x: _squares_step(*x, sign=-1.0),
            "the state moves away from the value.",
            "Which sign has the error?",
        ),
    ),
    tested="8 random states and tokens, in float64",
)

# ---- S2.5: least squares by the generalised delta rule ---------------------------------------------------


def _sequence(generator: torch.Generator, equal: bool = False) -> tuple[Tensor, ...]:
    length, d_k, d_v = _integer(generator, 3, 9), _integer(generator, 2, 5), _integer(generator, 1, 4)
    k, v = _randn(generator, length, d_k), _randn(generator, length, d_v)
    k = k[:1].repeat(length, 1) if equal else k
    return _randn(generator, length, d_k), k, v, 0.2 + _rand(generator, length)


def _gains(k: Tensor, beta: Tensor, *, fixed: bool = False, old: bool = False) -> Tensor:
    P, gains = _eye(k.shape[1]), []
    for k_t, b in zip(k, beta, strict=True):
        Pk = P @ k_t
        h = b * Pk / (1 + b * (k_t @ Pk))
        gains.append(b * Pk if old else h)
        P = P if fixed else P - torch.outer(h, Pk)
    return torch.stack(gains)


def _by_dplr(q, k, v, beta, *, erase="key", write="gain", sign=-1.0, **gains: bool) -> Tensor:
    h = _gains(k, beta, **gains)
    a, b = {"key": (sign * k, h), "swapped": (sign * h, k), "gain": (sign * h, h)}[erase]
    written = {"gain": h, "key": k, "weighted": beta[:, None] * k}[write]
    return recurrent_dplr(q, written, v, a, b, k.new_zeros(len(k)), scale=1.0)[0]


def _through_dplr(record: Record) -> str:
    """One call of the library, in which the gates are there (least squares by itself has none here)."""
    if not record.calls:
        return "never calls `recurrent_dplr`"
    if len(record.calls) > 1:
        return f"calls the library {len(record.calls)} times; asked for is one call of `recurrent_dplr`"
    if not any(operation.library and operation.name == "exp" for operation in record.operations):
        return "calls another function of the library than `recurrent_dplr`"
    return ""


GENERALISED = Exercise(
    number="S2.5",
    title="Least squares as a generalised delta rule",
    stars=3,
    minutes=25,
    sample=_sequence,
    reference=_by_dplr,
    rules=(
        Rule(
            lambda: (_sequence(torch.Generator().manual_seed(1)),),
            _through_dplr,
            "Compute the gains of all tokens from the keys, then call it once.",
        ),
    ),
    extremes=(
        Extreme(
            "equal keys",
            lambda g: _sequence(g, equal=True),
            "Then the gains fall from token to token.",
        ),
    ),
    mutants=(
        Mutant(
            lambda *x: _by_dplr(*x, fixed=True),
            "your gains never learn: P stays what it was before the first token.",
            "What does a token take from P?",
        ),
        Mutant(
            lambda *x: _by_dplr(*x, old=True),
            "your gains use P from before their token.",
            "Compare exercise S2.4.",
        ),
        Mutant(
            lambda *x: _by_dplr(*x, erase="swapped"),
            "a and b have changed places: the memory is asked under the gain, and erased along the key.",
            "In (Diag + b a^T) S, which of the two meets the state?",
        ),
        Mutant(
            lambda *x: _by_dplr(*x, write="weighted"),
            "values are written along beta k, while what was there is erased along the gain.",
            "Write S + h (v - S^T k)^T out as a matrix times S, and a rest.",
        ),
        Mutant(
            lambda *x: _by_dplr(*x, sign=1.0),
            "what the memory answers is added, not taken away.",
            "Which sign has the erasing term?",
        ),
        Mutant(
            lambda *x: _by_dplr(*x, erase="gain"),
            "your step is symmetric: it erases along the gain what it reads along the gain.",
            "The error is taken under k.",
        ),
        Mutant(
            lambda q, k, v, beta: recursive_least_squares(q, k, v, beta)[0],
            "the outputs are scaled by the square root of the number of channels.",
            "The exercise has scale = 1.",
        ),
    ),
    tested="8 random sequences, against recursive least squares with a ridge of 1, in float64",
)

ENTRIES = [CYCLE, FEWEST, TURN, SQUARES, GENERALISED]
