"""The exercises of chapter 2."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dn_lib.forms.delta_rule import delta_rule_step, recurrent_delta_rule
from dn_lib.forms.gated_delta_rule import recurrent_gated_delta_rule
from dn_lib.teaching.registry import Exercise, Mutant

F64 = torch.float64


def _int(g: torch.Generator, low: int, high: int) -> int:
    """An integer in low..high, both included."""
    return int(torch.randint(low, high + 1, (), generator=g))


def _randn(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=g, dtype=F64)


def _rand(g: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(shape, generator=g, dtype=F64)


def _unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def _write(k, v, beta, state):
    return delta_rule_step(k, k, v, beta, state)[1]


# -- 2.1 one write ---------------------------------------------------------------------------------------


def sample_write(g):
    dk, dv = _int(g, 2, 6), _int(g, 7, 9)
    return _randn(g, dk), _randn(g, dv), 0.1 + 0.8 * _rand(g), _randn(g, dk, dv)


def write_late_error(k, v, beta, state):
    state = state + beta * torch.outer(k, v)
    return state - beta * torch.outer(k, k @ state)


# -- 2.2 a sequence --------------------------------------------------------------------------------------


def sample_sequence(g):
    length, dk, dv = _int(g, 2, 7), _int(g, 2, 5), _int(g, 2, 5)
    k = _unit(_randn(g, length, dk))
    return _randn(g, length, dk), k, _randn(g, length, dv), _rand(g, length), _randn(g, dk, dv)


def sequence(q, k, v, beta, state):
    return recurrent_delta_rule(q, k, v, beta, scale=1.0, initial_state=state)


def sequence_read_first(q, k, v, beta, state):
    outputs = []
    for t in range(len(q)):
        outputs.append(q[t] @ state)
        state = _write(k[t], v[t], beta[t], state)
    return torch.stack(outputs), state


def sequence_read_last(q, k, v, beta, state):
    state = sequence(q, k, v, beta, state)[1]
    return q @ state, state


# -- 2.3 the beta that stores exactly --------------------------------------------------------------------


def sample_key(g):
    return (_randn(g, _int(g, 2, 8)) * (0.3 + 2 * _rand(g)),)


# -- 2.4 a property test ---------------------------------------------------------------------------------


def _bug_no_beta(k, v, beta, state):
    return _write(k, v, torch.ones_like(beta), state)


def _bug_no_erase(k, v, beta, state):
    return state + beta * torch.outer(k, v)


def _bug_late_error(k, v, beta, state):
    return write_late_error(k, v, beta, state)


def _bug_normalises(k, v, beta, state):
    return _write(_unit(k), v, beta, state)


def _bug_state_reset(k, v, beta, state):
    return beta * torch.outer(k, v)


def _bug_decays(k, v, beta, state):
    return (1 - beta) * state + beta * torch.outer(k, v)


def _bug_erase_all(k, v, beta, state):
    return state - torch.outer(k, k @ state) + beta * torch.outer(k, v)


def _right_matrix(k, v, beta, state):
    return (torch.eye(len(k), dtype=k.dtype) - beta * torch.outer(k, k)) @ state + beta * torch.outer(k, v)


def _right_erase_write(k, v, beta, state):
    v_old = state.mT @ k
    return state + torch.outer(k, beta * v - beta * v_old)


BUGS: dict[str, Callable] = {
    "beta is ignored": _bug_no_beta,
    "nothing is erased": _bug_no_erase,
    "the error is taken after the write": _bug_late_error,
    "the key is normalised inside, so that its length does not count": _bug_normalises,
    "the state is thrown away": _bug_state_reset,
    "the whole state decays, not only its part along the key": _bug_decays,
    "beta is missing from the erasure": _bug_erase_all,
}
RIGHT: tuple[Callable, ...] = (_write, _right_matrix, _right_erase_write)
IMPLEMENTATIONS: tuple[Callable, ...] = (*RIGHT, *BUGS.values())


def sample_implementation(g):
    return (IMPLEMENTATIONS[_int(g, 0, len(IMPLEMENTATIONS) - 1)],)


def is_right(implementation) -> bool:
    return implementation in RIGHT


def _misses(name: str) -> Mutant:
    return Mutant(
        lambda implementation: implementation in RIGHT or implementation is BUGS[name],
        f"Your test accepts an implementation with a bug: {name}.",
        "Which inputs make that bug visible: which state, which key, which beta?",
    )


def only_storage(step) -> bool:
    """A test that is too weak: a unit key, beta = 1, and nothing but the answer for that key."""
    k, v, state = torch.eye(3, dtype=F64)[0], torch.arange(1.0, 3.0, dtype=F64), torch.ones(3, 2, dtype=F64)
    return bool(torch.allclose(k @ step(k, v, torch.tensor(1.0, dtype=F64), state), v))


def only_from_zeros(step) -> bool:
    """A test that is too weak: every memory starts empty."""
    k, v, beta = torch.full((3,), 0.7, dtype=F64), torch.ones(2, dtype=F64), torch.tensor(0.3, dtype=F64)
    return bool(torch.allclose(step(k, v, beta, torch.zeros(3, 2, dtype=F64)), beta * torch.outer(k, v)))


# -- 2.5 sweeps ------------------------------------------------------------------------------------------


def sample_sweeps(g):
    dk, dv = _int(g, 3, 6), _int(g, 1, 3)
    n = _int(g, 2, dk)
    return _unit(_randn(g, n, dk)), _randn(g, n, dv), 0.2 + 0.7 * _rand(g), _int(g, 2, 4)


def sweeps(keys, values, beta, passes):
    n = len(keys)
    state = torch.zeros(keys.shape[1], values.shape[1], dtype=keys.dtype)
    for _ in range(passes):
        state = recurrent_delta_rule(keys, keys, values, beta.expand(n), initial_state=state)[1]
    return state


def sweeps_batch(keys, values, beta, passes):
    state = torch.zeros(keys.shape[1], values.shape[1], dtype=keys.dtype)
    for _ in range(passes):
        state = state + beta * keys.mT @ (values - keys @ state)
    return state


def sweeps_backwards(keys, values, beta, passes):
    return sweeps(keys.flip(0), values.flip(0), beta, passes)


def sweeps_additive(keys, values, beta, passes):
    return passes * beta * keys.mT @ values


def sweeps_each_key_repeated(keys, values, beta, passes):
    return sweeps(keys.repeat_interleave(passes, 0), values.repeat_interleave(passes, 0), beta, 1)


# -- 2.6 parity ------------------------------------------------------------------------------------------


def sample_bits(g):
    bits = torch.randint(2, (_int(g, 6, 20),), generator=g).to(F64)
    bits[0], bits[2] = 1, 1  # so that the mistakes below differ on every draw
    return (bits,)


def _one_number(beta, value=0.0):
    one = torch.ones(len(beta), 1, dtype=beta.dtype)
    start = torch.ones(1, 1, dtype=beta.dtype)
    return recurrent_delta_rule(one, one, value * one, beta, scale=1.0, initial_state=start)[0][:, 0]


# -- 2.7 and 2.8 the gated delta rule --------------------------------------------------------------------


def sample_gated(g):
    length, dk, dv = _int(g, 3, 7), _int(g, 2, 5), _int(g, 2, 5)
    q, k, v = _randn(g, length, dk), _unit(_randn(g, length, dk)), _randn(g, length, dv)
    return q, k, v, 0.5 + 0.4 * _rand(g, length), 0.1 + 0.8 * _rand(g, length)


def gated(q, k, v, alpha, beta):
    return recurrent_gated_delta_rule(q, k, v, alpha, beta, scale=1.0)


def gated_by_loop(update):
    def run(q, k, v, alpha, beta):
        state, outputs = torch.zeros(k.shape[1], v.shape[1], dtype=k.dtype), []
        for t in range(len(k)):
            state = update(alpha[t], beta[t], k[t], v[t], state)
            outputs.append(q[t] @ state)
        return torch.stack(outputs), state

    return run


def _rescaled(values, outputs):
    def run(q, k, v, alpha, beta):
        total = alpha.cumprod(0)[:, None]
        o, state = recurrent_delta_rule(q, k, values(v, total, alpha[:, None]), beta, scale=1.0)
        return outputs(o, total, alpha[:, None]), total[-1] * state

    return run


ENTRIES = [
    Exercise(
        "2.1",
        "One write",
        1,
        5,
        sample_write,
        _write,
        (
            Mutant(
                _bug_no_erase,
                "That is linear attention's write: what was stored under k stays and v is added to it.",
                "What does the state answer for k before the write? That has to go.",
            ),
            Mutant(
                write_late_error,
                "The error is taken after the write, so part of the new value is erased again.",
                "Ask the old state for its answer before you change it.",
            ),
            Mutant(
                _bug_erase_all,
                "Your erasure takes out the whole old answer: beta is missing there.",
                "How much is erased at beta = 0?",
            ),
            Mutant(
                _bug_decays,
                "You let the whole state decay by 1 - beta; only its part along the key should go.",
                "What should happen to a value stored under a key orthogonal to this one?",
            ),
            Mutant(
                lambda k, v, beta, state: state + beta * torch.outer(k, k @ state - v),
                "The sign of the error is wrong: this climbs the loss.",
                "After the write the answer for k should be nearer to v.",
            ),
        ),
        "8 random writes in float64, keys of any length",
    ),
    Exercise(
        "2.2",
        "A sequence",
        2,
        10,
        sample_sequence,
        sequence,
        (
            Mutant(
                sequence_read_first,
                "You read before the write, so a token does not see itself.",
                "Compare the index of S in the output equation with that of q.",
            ),
            Mutant(
                sequence_read_last,
                "All queries read the last state: the past has seen the future.",
                "When is output t computed, and from which state?",
            ),
            Mutant(
                lambda q, k, v, beta, state: recurrent_delta_rule(q, k, v, beta, initial_state=state),
                "You scaled the queries; this exercise asks for scale 1.",
                "Which factor does the task's first sentence name?",
            ),
            Mutant(
                lambda q, k, v, beta, state: recurrent_delta_rule(q, k, v, beta, scale=1.0),
                "You started from zeros, not from the given state.",
                "Which S does the first token find?",
            ),
        ),
        "8 random sequences with an initial state",
    ),
    Exercise(
        "2.3",
        "The beta that stores exactly",
        1,
        5,
        sample_key,
        lambda k: 1 / (k @ k),
        (
            Mutant(
                lambda k: 1 / k.norm(),
                "You divided by |k|, as the misprinted eigenvalue 1 - beta |k| suggests.",
                "How many times does k enter k k^T?",
            ),
            Mutant(
                lambda k: torch.ones((), dtype=k.dtype),
                "Beta = 1 stores exactly if |k| = 1; this key has another length.",
                "Set the factor by which a write shrinks the error to zero and solve for beta.",
            ),
            Mutant(
                lambda k: 2 / (k @ k),
                "That is the reflection: the error changes its sign and keeps its size.",
                "You want the factor 1 - beta |k|^2 to be 0, not -1.",
            ),
        ),
        "8 random keys, some shorter than one and some longer",
    ),
    Exercise(
        "2.4",
        "A property test",
        2,
        15,
        sample_implementation,
        is_right,
        (
            Mutant(
                lambda implementation: True,
                "Your test accepts everything that it is given.",
                "Return False as soon as one property fails.",
            ),
            Mutant(
                lambda implementation: False,
                "Your test rejects right implementations too.",
                "Compare floating-point results with a tolerance; are all your properties true of the delta rule?",
            ),
            Mutant(
                only_storage,
                "Your test only asks whether a write with beta = 1 stores its value.",
                "What else has the chapter shown of a write: for other betas, other keys, other directions?",
            ),
            Mutant(
                only_from_zeros,
                "Your test starts from an empty memory only, where there is nothing to erase.",
                "Put something into the state first.",
            ),
            *(_misses(name) for name in BUGS),
        ),
        f"{len(RIGHT)} right implementations and {len(BUGS)} with a bug",
        trials=60,
    ),
    Exercise(
        "2.5",
        "Sweeps over the keys",
        2,
        15,
        sample_sweeps,
        sweeps,
        (
            Mutant(
                sweeps_batch,
                "All errors of a pass are computed from the same state: that is batch gradient descent.",
                "The second write of a pass should see what the first did.",
            ),
            Mutant(
                sweeps_backwards,
                "You went through the keys from the last to the first.",
                "The order matters, since writes do not commute.",
            ),
            Mutant(
                sweeps_additive,
                "Nothing is erased: repeating the pass only multiplies the state.",
                "Each write needs the error at that moment.",
            ),
            Mutant(
                sweeps_each_key_repeated,
                "You wrote each key several times in a row, then went to the next.",
                "Which loop is the outer one?",
            ),
        ),
        "8 random systems, 2 to 4 passes",
    ),
    Exercise(
        "2.6",
        "Parity with one number",
        2,
        10,
        sample_bits,
        lambda bits: _one_number(2 * bits),
        (
            Mutant(
                _one_number,
                "With beta = x the first one erases the state, and zero it stays.",
                "By which factor should a one multiply the state?",
            ),
            Mutant(
                lambda bits: _one_number(2 - 2 * bits),
                "You counted the zeros.",
                "Which bit should leave the state alone?",
            ),
            Mutant(
                lambda bits: bits.cumsum(0) % 2,
                "You returned the parity itself as 0 or 1; asked for is the state, +1 or -1.",
                "The state starts at +1 and changes its sign.",
            ),
            Mutant(
                lambda bits: _one_number(torch.ones_like(bits), (1 - 2 * bits)[:, None]),
                "With beta = 1 the state holds the last bit only; it has forgotten all others.",
                "What has to be written, if the state's size is to stay 1?",
            ),
        ),
        "8 random bit strings",
    ),
    Exercise(
        "2.7",
        "The gated delta rule",
        2,
        15,
        sample_gated,
        gated,
        (
            Mutant(
                gated_by_loop(lambda a, b, k, v, s: a * _write(k, v, b, s)),
                "Your decay also shrinks the value that is being written.",
                "When is the state multiplied by alpha: before the write or after?",
            ),
            Mutant(
                gated_by_loop(lambda a, b, k, v, s: a * s + b * torch.outer(k, v - k @ s)),
                "You computed the error from the state before its decay.",
                "In the equation alpha multiplies the erased state as a whole.",
            ),
            Mutant(
                gated_by_loop(lambda a, b, k, v, s: _write(k, v, b, s)),
                "Alpha is not used: this is the plain delta rule.",
                "At beta = 0 the state should still shrink.",
            ),
            Mutant(
                gated_by_loop(lambda a, b, k, v, s: a * s + b * torch.outer(k, v)),
                "That is decay without erasure, as in a gated linear attention.",
                "What happened to I - beta k k^T?",
            ),
        ),
        "8 random sequences",
    ),
    Exercise(
        "2.8",
        "The gate as a change of units",
        3,
        40,
        sample_gated,
        gated,
        (
            Mutant(
                _rescaled(lambda v, total, a: v * total, lambda o, total, a: o * total),
                "The values are multiplied by the total decay where they should go the other way.",
                "If S = c R, which value must be written into R for v to be written into S?",
            ),
            Mutant(
                _rescaled(lambda v, total, a: v / total, lambda o, total, a: o),
                "The state is rescaled back, the outputs are not.",
                "Output t is read from the state at t: by what must it be multiplied?",
            ),
            Mutant(
                _rescaled(lambda v, total, a: v / a, lambda o, total, a: o * total),
                "You divided each value by its own alpha, not by the product of all so far.",
                "What has become of a state's unit after t decays?",
            ),
            Mutant(
                _rescaled(lambda v, total, a: v / total * a, lambda o, total, a: o * total),
                "The total decay is taken up to the token before.",
                "Does token t's own alpha come before its write or after it?",
            ),
        ),
        "8 random sequences",
    ),
]
