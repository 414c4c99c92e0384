"""The exercises of chapter 2."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from dn_lib.forms.delta_rule import recurrent_delta_rule
from dn_lib.teaching.judge.method import no_library, no_operations, no_second_implementation, no_square, through
from dn_lib.teaching.registry import Candidate, Exercise, Extreme, Mutant

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
    return state + torch.outer(k, beta * (v - k @ state))


def _fixed(length: int, dk: int = 3, dv: int = 5, *, beta: float | None = None) -> tuple[Tensor, ...]:
    """q, unit k, v and beta of one size: for extremes, and to look at the method."""
    g = torch.Generator().manual_seed(length)
    q, k, v, b = _randn(g, length, dk), _unit(_randn(g, length, dk)), _randn(g, length, dv), _rand(g, length)
    return q, k, v, b if beta is None else torch.full_like(b, beta)


def _one_write(beta: float = 0.5, dk: int = 3) -> tuple[Tensor, ...]:
    """k, v, beta and a state."""
    g = torch.Generator().manual_seed(dk)
    _, k, v, b = _fixed(1, dk, beta=beta)
    return k[0], v[0], b[0], _randn(g, dk, 5)


def _with_state(*inputs: Tensor) -> tuple[Tensor, ...]:
    return *inputs, _randn(torch.Generator().manual_seed(9), inputs[1].shape[1], inputs[2].shape[1])


WIDE = 31  # a d_k whose square is more than all inputs hold, so that a matrix of that size shows
ERASE_AND_STORE = "Is nothing changed at beta = 0? And is the error reversed at beta = 2, for a unit key?"


# -- 2.1 one write ---------------------------------------------------------------------------------------


def sample_write(g):
    dk, dv = _int(g, 2, 6), _int(g, 7, 9)
    return _randn(g, dk), _randn(g, dv), 0.1 + 0.8 * _rand(g), _randn(g, dk, dv)


def write_late_error(k, v, beta, state):
    state = state + beta * torch.outer(k, v)
    return state - beta * torch.outer(k, k @ state)


def write_erasing_less(k, v, beta, state):
    """beta on the erasure alone."""
    return state + torch.outer(k, v - beta * (k @ state))


# -- 2.2 a sequence --------------------------------------------------------------------------------------


def sample_sequence(g):
    length, dk, dv = _int(g, 2, 7), _int(g, 2, 5), _int(g, 2, 5)
    k = _unit(_randn(g, length, dk))
    return _randn(g, length, dk), k, _randn(g, length, dv), _rand(g, length), _randn(g, dk, dv)


def sequence(q, k, v, beta, state, *, write=_write, reads="after"):
    first, outputs = state, []
    for t in range(len(q)):
        new = write(k[t], v[t], beta[t], state)
        outputs.append(q[t] @ {"after": new, "before": state, "first": first}[reads])
        state = new
    return torch.stack(outputs), state


def sequence_at_once(q, k, v, beta, state):
    written = beta[:, None] * (v - k @ state)
    return q @ state + (q @ k.T).tril() @ written, state + k.T @ written


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


def _bug_fades_aside(k, v, beta, state):
    """Right along the key, whatever its length."""
    along = torch.outer(k, k @ state) / (k @ k)
    return _write(k, v, beta, state) - beta * (state - along)


def _bug_erase_all(k, v, beta, state):
    return state - torch.outer(k, k @ state) + beta * torch.outer(k, v)


def _right_matrix(k, v, beta, state):
    return (torch.eye(len(k), dtype=k.dtype) - beta * torch.outer(k, k)) @ state + beta * torch.outer(k, v)


def _right_erase_write(k, v, beta, state):
    v_old = state.mT @ k
    return state + torch.outer(k, beta * v - beta * v_old)


_PROPERTIES = "Which inputs make that bug visible: which state, which key, which beta?"
_ROUNDING = "Compare floating-point results with a tolerance; are all your properties true of the delta rule?"
CANDIDATES = (
    Candidate(_write, "the write of the chapter", _ROUNDING, right=True),
    Candidate(_right_matrix, "the write as a matrix times the state, which rounds differently", _ROUNDING, right=True),
    Candidate(_right_erase_write, "erase, then write, which rounds differently", _ROUNDING, right=True),
    Candidate(_bug_no_beta, "beta is ignored", "Beta = 1 hides it. Use another beta."),
    Candidate(_bug_no_erase, "nothing is erased", "Put something into the state first."),
    Candidate(_bug_late_error, "the error is taken after the write", _PROPERTIES),
    Candidate(
        _bug_normalises,
        "the key is normalised inside, so that its length does not count",
        "Use a key whose length is not one.",
    ),
    Candidate(_bug_state_reset, "the state is thrown away", "What happens to a direction orthogonal to the key?"),
    Candidate(
        _bug_fades_aside,
        "the directions orthogonal to the key decay as well",
        "What happens to a direction orthogonal to the key?",
    ),
    Candidate(_bug_erase_all, "beta is missing from the erasure", "Use a beta that is neither 0 nor 1."),
)


def properties(step, *, length=2.0, beta=0.3, aside=True, along=True, empty=False, equal=False) -> bool:
    """A test by properties; each keyword argument but the defaults makes it a weak one."""
    _, k, v, b = (x[0] for x in _fixed(1, beta=beta))
    k, state = length * k, _randn(torch.Generator().manual_seed(9), 3, 5) * (not empty)
    new, same = step(k, v, b, state), torch.equal if equal else torch.allclose
    across = torch.eye(3, dtype=F64) - torch.outer(k, k) / (k @ k)
    right = not along or same(v - k @ new, (1 - b * (k @ k)) * (v - k @ state))
    return bool(right and (not aside or same(across @ new, across @ state)))


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


def sweeps(keys, values, beta, passes, *, write=_write):
    state = torch.zeros(keys.shape[1], values.shape[1], dtype=keys.dtype)
    for _ in range(passes):
        for k, v in zip(keys, values, strict=True):
            state = write(k, v, beta, state)
    return state


def _system(n: int = 4, beta: float = 0.5, passes: int = 3) -> tuple[Tensor, Tensor, Tensor, int]:
    _, keys, values, _ = _fixed(n, 5, 2)
    return keys, values, torch.tensor(beta, dtype=F64), passes


def _zigzag(keys, values, beta, passes):
    both = ((keys, values), (keys.flip(0), values.flip(0)))
    order = [both[n % 2] for n in range(passes)]
    return sweeps(torch.cat([k for k, _ in order]), torch.cat([v for _, v in order]), beta, 1)


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
    bits[0], bits[1], bits[3] = 0, 1, 1  # so that the mistakes below differ on every draw
    return (bits,)


def _one_number(beta, value=0.0, begin=1.0):
    one = torch.ones(len(beta), 1, dtype=beta.dtype)
    start = torch.full((1, 1), begin, dtype=beta.dtype)
    return recurrent_delta_rule(one, one, value * one, beta, scale=1.0, initial_state=start)[0][:, 0]


# -- 2.7 and 2.8 the gated delta rule --------------------------------------------------------------------


def sample_gated(g):
    length, dk, dv = _int(g, 3, 7), _int(g, 2, 5), _int(g, 2, 5)
    q, k, v = _randn(g, length, dk), _unit(_randn(g, length, dk)), _randn(g, length, dv)
    return q, k, v, 0.5 + 0.4 * _rand(g, length), 0.1 + 0.8 * _rand(g, length)


def gated_by_loop(update):
    def run(q, k, v, alpha, beta):
        state, outputs = torch.zeros(k.shape[1], v.shape[1], dtype=k.dtype), []
        for t in range(len(k)):
            state = update(alpha[t], beta[t], k[t], v[t], state)
            outputs.append(q[t] @ state)
        return torch.stack(outputs), state

    return run


def gated(q, k, v, alpha, beta):
    state, outputs = torch.zeros(k.shape[1], v.shape[1], dtype=k.dtype), []
    for t in range(len(k)):
        state = alpha[t] * state
        state = _write(k[t], v[t], beta[t], state)
        outputs.append(q[t] @ state)
    return torch.stack(outputs), state


def _gate_on_outputs(q, k, v, alpha, beta):
    o, state = gated_by_loop(lambda a, b, k, v, s: _write(k, v, b, s))(q, k, v, alpha, beta)
    return alpha[:, None] * o, state


def _rescaled(
    values=lambda v, total, a: v / total,
    outputs=lambda o, total, a: o * total,
    *,
    keys=lambda k, total: k,
    last=True,
    product=True,
    scale: float | None = 1.0,
):
    def run(q, k, v, alpha, beta):
        total = (alpha.cumprod(0) if product else alpha)[:, None]
        new = values(v, total, alpha[:, None])
        o, state = recurrent_delta_rule(q, keys(k, total), new, beta, scale=scale)
        return outputs(o, total, alpha[:, None]), total[-1] * state if last else state

    return run


def by_rescaling(q, k, v, alpha, beta):
    total = alpha.cumprod(0)[:, None]
    o, state = recurrent_delta_rule(q, k, v / total, beta, scale=1.0)
    return o * total, total[-1] * state


_GATE_EXTREMES = (
    Extreme("one token", lambda g: _gates(_fixed(1), 0.5), "From a zero state, one token is written and read."),
    Extreme("beta = 0", lambda g: _gates(_fixed(5, beta=0.0), 0.5), "At beta = 0 the state only shrinks."),
    Extreme("beta = 2", lambda g: _gates(_fixed(5, beta=2.0), 0.5), "At beta = 2 each write reflects."),
    Extreme("alpha = 1", lambda g: _gates(_fixed(5), 1.0), "At alpha = 1 it is the plain delta rule."),
)


def _gates(inputs: tuple[Tensor, ...], alpha: float) -> tuple[Tensor, ...]:
    q, k, v, beta = inputs
    return q, k, v, torch.full_like(beta, alpha), beta


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
                lambda k, v, beta, state: _write(k, v, 1.0, state),
                "Beta is not used: every write replaces the old value in full, as with beta = 1.",
                "How much of the error is corrected at beta = 1/2?",
            ),
            Mutant(
                lambda k, v, beta, state: _write(k, v, beta * beta, state),
                "Beta comes in squared: it multiplies the error twice.",
                "Once in the error or once in the update, not in both.",
            ),
            Mutant(
                lambda k, v, beta, state: state + beta * torch.outer(v, k - state @ v).mT,
                "Keys and values are exchanged: you correct what the state returns for v.",
                "The state maps keys to values. What does it answer for k?",
            ),
            Mutant(
                write_erasing_less,
                "Beta multiplies the erasure alone: the new value is written in full.",
                "The error as a whole is what beta scales.",
            ),
            Mutant(
                lambda k, v, beta, state: _write(_unit(k), v, beta, state),
                "You normalise the key: here its length counts.",
                "The task gives keys of any length, and the equation takes k as it is.",
            ),
            Mutant(
                lambda k, v, beta, state: state + beta * torch.outer(k, k @ state - v),
                "The sign of the error is wrong: this climbs the loss.",
                "After the write the answer for k should be nearer to v.",
            ),
        ),
        "8 random writes in float64, keys of any length",
        extremes=(
            Extreme("beta = 0", lambda g: _one_write(0.0), "At beta = 0 nothing is erased and nothing written."),
            Extreme("beta = 2", lambda g: _one_write(2.0), ERASE_AND_STORE),
        ),
        keeps_inputs=True,
        rules=(
            no_library(_one_write, hint="Three lines of your own: the old answer, the error, the update."),
            no_square(
                lambda: _one_write(dk=WIDE),
                WIDE,
                "d_k x d_k",
                "k^T S is a vector: ask the state before you form a matrix.",
            ),
        ),
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
                sequence_at_once,
                "All errors are taken against the state that was given: no token sees what earlier ones wrote.",
                "Write the same key twice. What should the second write find?",
            ),
            Mutant(
                partial(sequence, reads="before"),
                "You read before the write, so a token does not see itself.",
                "Compare the index of S in the output equation with that of q.",
            ),
            Mutant(
                partial(sequence, reads="first"),
                "All queries read the first state, the one given, and see none of the writes.",
                "When is output t computed, and from which state?",
            ),
            Mutant(
                partial(sequence, write=_bug_no_erase),
                "Nothing is erased before a write: this is linear attention with a beta.",
                "What does the state answer for k before the write? That has to go.",
            ),
            Mutant(
                partial(sequence, write=write_late_error),
                "The error is taken after the write, so part of the new value is erased again.",
                "Ask the old state for its answer before you change it.",
            ),
            Mutant(
                partial(sequence, write=_bug_no_beta),
                "Beta is not used: every write replaces the old value in full, as with beta = 1.",
                "Each token has a beta of its own.",
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
        extremes=(
            Extreme("one token", lambda g: _with_state(*_fixed(1)), "A sequence may be one token long."),
            Extreme("beta = 0", lambda g: _with_state(*_fixed(5, beta=0.0)), "At beta = 0 the state stays as it is."),
            Extreme("beta = 2", lambda g: _with_state(*_fixed(5, beta=2.0)), ERASE_AND_STORE),
        ),
        outputs=("o", "the state"),
        rules=(no_library(lambda: _with_state(*_fixed(3)), hint="Your `write`, once per token, in a loop."),),
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
                "You divided by |k|. The key enters a write twice, in the error and in the update.",
                "How many times does k enter k k^T?",
            ),
            Mutant(
                lambda k: torch.ones((), dtype=k.dtype),
                "Beta = 1 stores exactly if |k| = 1; this key has another length.",
                "Set the factor by which a write shrinks the error to zero and solve for beta.",
            ),
            Mutant(
                lambda k: torch.full((), 1 / len(k), dtype=k.dtype),
                "You divide by the number of entries; it is the key's length, |k|, that counts.",
                "Set the factor by which a write shrinks the error to zero and solve for beta.",
            ),
            Mutant(
                lambda k: 2 / (k @ k),
                "That is the reflection: the error changes its sign and keeps its size.",
                "You want the factor 1 - beta |k|^2 to be 0, not -1.",
            ),
        ),
        "8 random keys, some shorter than one and some longer",
        extremes=(
            Extreme("a key of one entry", lambda g: (torch.full((1,), -3.0, dtype=F64),), "A key may be negative."),
            Extreme(
                "a very long key", lambda g: (1e6 * torch.ones(3, dtype=F64),), "The answer is small, and not zero."
            ),
        ),
    ),
    Exercise(
        "2.4",
        "A property test",
        2,
        15,
        lambda g: (),
        properties,
        (
            Mutant(
                lambda step: True,
                "Your test accepts everything that it was shown; all 7 bugs get through:",
                "Beta = 1 hides it. Use another beta.",
            ),
            Mutant(
                lambda step: False,
                "Your test rejects everything that it was shown, the 3 right implementations too.",
                _ROUNDING,
            ),
            Mutant(only_storage, "gets through: beta is ignored", "Beta = 1 hides it. Use another beta."),
            Mutant(only_from_zeros, "gets through: nothing is erased", "Put something into the state first."),
            Mutant(
                partial(properties, aside=False),
                "gets through: the directions orthogonal to the key decay as well",
                "What happens to a direction orthogonal to the key?",
            ),
            Mutant(
                partial(properties, length=1.0),
                "gets through: the key is normalised inside",
                "Use a key whose length is not one.",
            ),
            Mutant(
                partial(properties, equal=True),
                "rejected though right: the write as a matrix times the state",
                _ROUNDING,
            ),
        ),
        f"3 right implementations and {len(CANDIDATES) - 3} with a bug",
        rules=(
            no_second_implementation(
                _write,
                "the new state",
                "If your own version had the bug, too, would you see it? Look along the key, and orthogonal to it.",
            ),
        ),
        candidates=CANDIDATES,
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
                lambda keys, values, beta, passes: sweeps(keys, values, beta, 1),
                "Your answer is the state after one pass only.",
                "Where does the state of a pass begin: at zero, or where the pass before it ended?",
            ),
            Mutant(
                partial(sweeps, write=_bug_no_beta),
                "Beta is not used: every write replaces the old value in full, as with beta = 1.",
                "By how much does one write shrink the error of its key?",
            ),
            Mutant(
                partial(sweeps, write=write_late_error),
                "The error is taken after the write, so part of the new value is erased again.",
                "Ask the old state for its answer before you change it.",
            ),
            Mutant(
                lambda keys, values, beta, passes: sweeps(keys, values, beta, passes + 1),
                "You made one pass too many.",
                "How often does your outer loop run for passes = 1?",
            ),
            Mutant(
                _zigzag,
                "Every second pass of yours goes backwards, from the last key to the first.",
                "The task gives one order for all passes.",
            ),
            Mutant(
                lambda keys, values, beta, passes: torch.linalg.pinv(keys) @ values,
                "That is the least squares solution, the limit of infinitely many passes.",
                "The task asks for a given number of passes, write by write.",
            ),
            Mutant(
                sweeps_each_key_repeated,
                "You wrote each key several times in a row, then went to the next.",
                "Which loop is the outer one?",
            ),
        ),
        "8 random systems, 2 to 4 passes",
        extremes=(
            Extreme("one pass", lambda g: _system(passes=1), "One pass is an ordinary sequence of writes."),
            Extreme("one key", lambda g: _system(n=1), "With one key, a pass is one write."),
            Extreme("beta = 1", lambda g: _system(beta=1.0), "At beta = 1 the last key of a pass is stored exactly."),
        ),
        rules=(no_library(_system, hint="Two loops around the write of exercise 2.1."),),
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
                lambda bits: _one_number(2 * bits, begin=0.0),
                "Your state starts at 0, and zero times anything stays zero.",
                "The state starts at +1 and changes its sign.",
            ),
            Mutant(
                lambda bits: _one_number(2 * bits, bits[:, None]),
                "You store the bit as a value as well: a one then adds 2 to the reflected state.",
                "What has to be written, if the state's size is to stay 1?",
            ),
            Mutant(
                lambda bits: bits.cumsum(0),
                "That is the number of ones so far, a count and not a parity.",
                "The state starts at +1 and changes its sign.",
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
        extremes=(
            Extreme("one bit", lambda g: (torch.ones(1, dtype=F64),), "One bit is enough to change the sign."),
            Extreme("zeros only", lambda g: (torch.zeros(5, dtype=F64),), "A zero leaves the state alone."),
        ),
        rules=(
            through(
                lambda: (torch.tensor([1.0, 0.0, 1.0], dtype=F64),),
                "recurrent_delta_rule",
                "The point is that the delta rule itself counts. Which beta flips the sign of a state?",
            ),
            no_operations(
                lambda: (torch.tensor([1.0, 0.0, 1.0], dtype=F64),),
                {"cumprod": "`cumprod`", "cumsum": "`cumsum`", "remainder": "a remainder"},
                "The recurrence is to do the counting.",
            ),
        ),
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
                gated_by_loop(lambda a, b, k, v, s: s - a * b * torch.outer(k, k @ s) + b * torch.outer(k, v)),
                "Alpha multiplies the erasure alone: what is not erased does not fade.",
                "In the equation, does alpha stand before the bracket or inside it?",
            ),
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
                _gate_on_outputs,
                "The gate multiplies the outputs, not the state: what is stored does not fade.",
                "Which of the two lines of the recurrence has alpha in it?",
            ),
            Mutant(
                gated_by_loop(lambda a, b, k, v, s: _write(k, v, b, (1 - a) * s)),
                "You multiply the state by 1 - alpha: here alpha is what is kept, not what is lost.",
                "At alpha = 1 it should be the plain delta rule.",
            ),
            Mutant(
                gated_by_loop(lambda a, b, k, v, s: _write(k, v, a, b * s)),
                "Alpha and beta are exchanged.",
                "Which of the two multiplies the whole state?",
            ),
            Mutant(
                gated_by_loop(lambda a, b, k, v, s: a * s + b * torch.outer(k, v)),
                "That is decay without erasure, as in a gated linear attention.",
                "What happened to I - beta k k^T?",
            ),
        ),
        "8 random sequences",
        extremes=(
            *_GATE_EXTREMES,
            Extreme(
                "400 tokens with alpha = 0.05",
                lambda g: _gates(_fixed(400), 0.05),
                "The product of all alphas underflows: nothing may be divided by it.",
            ),
        ),
        outputs=("o", "the state"),
        rules=(
            no_library(lambda: _gates(_fixed(3), 0.5), hint="A loop with a decay in front of the write."),
            no_square(
                lambda: _gates(_fixed(3, WIDE), 0.5),
                WIDE,
                "d_k x d_k",
                "k^T S is a vector: ask the decayed state before you form a matrix.",
            ),
        ),
    ),
    Exercise(
        "2.8",
        "The gate as a change of units",
        3,
        40,
        sample_gated,
        by_rescaling,
        (
            Mutant(
                _rescaled(last=False),
                "The outputs are rescaled back, the last state is not.",
                "The state that the library returns is R_L. What is S_L?",
            ),
            Mutant(
                _rescaled(lambda v, total, a: v),
                "The values go in as they are: only what comes out is rescaled.",
                "If S = c R, which value must be written into R for v to be written into S?",
            ),
            Mutant(
                _rescaled(scale=None),
                "You left the scale at the library's default, d_k^-1/2; this exercise asks for scale 1.",
                "Which factor does the task name?",
            ),
            Mutant(
                _rescaled(keys=lambda k, total: k / total),
                "You changed the keys as well: then they erase with another strength.",
                "In the equation of R, which of k, v and beta stay what they were?",
            ),
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
                _rescaled(product=False),
                "You took each token's own alpha, not the product of all so far, into the units of v and o.",
                "What has become of a state's unit after t decays?",
            ),
            Mutant(
                _rescaled(lambda v, total, a: v / a),
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
        extremes=_GATE_EXTREMES,
        outputs=("o", "the state"),
        rules=(
            through(
                lambda: _gates(_fixed(4), 0.5),
                "recurrent_delta_rule",
                "The gate has to disappear into the inputs and come back in the outputs, around one call.",
            ),
        ),
    ),
]
