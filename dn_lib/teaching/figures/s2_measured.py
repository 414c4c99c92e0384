"""What the figures of study 2 show, measured: machines made by hand, groups, least squares, two starts of a layer.

Everything is computed by `dn_lib` in float64, from a generator of its own; layers are trained in the default dtype.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dn_lib.data.state_tracking import permutations_of
from dn_lib.forms.delta_product import fewest_steps, permutation_steps, recurrent_delta_product
from dn_lib.forms.least_squares import recursive_least_squares
from dn_lib.layers import DeltaNet, mimetic_
from dn_lib.layers.registry import Mixer
from dn_lib.teaching.figures.ch2_measured import recall_errors
from dn_lib.teaching.tables import Table

DOUBLE = torch.float64
SURE = 1000.0  # a logit whose sigmoid is 1 in float64, and minus it 0
WORDS = "python -m experiments reproduce tracking --cells 's3-*' 's5-*'"
STARTS = "python -m experiments expressiveness"


# --- Machines made by hand -------------------------------------------------------------------------------
class WordMachine(nn.Module):
    """One DeltaNet layer with one head, whose weights are written down, that says the product of the letters so far.

    Tokens are rows of `permutations_of(degree)`; the number of them is the token that begins a word.  Logits are for
    the rows of `permutations_of(degree)`, as `permutation_composition` labels them.

    The first token writes S_0 = u 1^T + p 2^T with orthogonal keys, where u has equal entries, which no permutation
    moves, and the entries of p are all different; a letter then permutes the rows of the state, and the query, a number
    in base `degree`, reads which permutation of p there is.  steps: delta steps per token, at least degree - 1.
    top: the layer's `beta_range`; below 2 the swaps are as near to reflections as it allows.

    >>> machine = WordMachine(3)
    >>> machine(torch.tensor([[6, 1, 2]])).argmax(-1).tolist()  # swap the last two, then the first two
    [[0, 1, 3]]
    """

    def __init__(self, degree: int, *, steps: int | None = None, top: float = 2.0):
        super().__init__()
        letters = permutations_of(degree)
        k, beta = permutation_steps(letters, max(degree - 1, 1) if steps is None else steps)
        self.letters, self.degree = len(letters), degree
        layer = DeltaNet(
            self.letters + 1, 1, degree, activation="identity", conv_size=0, beta_range=top, steps=k.shape[1],
            norm_eps=1e-30,
        )  # fmt: skip
        self.layer = layer.double()
        still, moved = torch.ones(degree, dtype=DOUBLE), torch.linspace(-1, 1, degree, dtype=DOUBLE)
        query = F.normalize(degree ** torch.arange(degree, dtype=DOUBLE), dim=0)
        begins = torch.stack([F.normalize(x, dim=0) for x in (moved, still)])[: k.shape[1]]
        logits = torch.where(beta > 0, SURE, -SURE)
        with torch.no_grad():
            for weight in self.layer.parameters():
                weight.zero_()
            self.layer.norm.weight.fill_(1)
            self.layer.get_parameter("query.weight").copy_(query[:, None].expand(-1, self.letters + 1))
            key, value, strength = (self.layer.get_parameter(f"{name}.weight") for name in ("key", "value", "beta"))
            key[:, :-1] = k.flatten(1).T
            key[:, -1] = 1  # of a step that is not used; any
            strength[:, :-1] = logits.T
            strength[:, -1] = -SURE
            for n, start in enumerate(begins):  # what the first token writes, with beta = 1
                key[n * degree : (n + 1) * degree, -1] = start
                value[n * degree + n, -1] = 1
                strength[n, -1] = SURE if top == 1 else -torch.tensor(top - 1, dtype=DOUBLE).log()
            self.layer.output.weight[:-1] = self._answers(letters, begins, query)

    def _answers(self, letters: Tensor, begins: Tensor, query: Tensor) -> Tensor:
        """What the normalised read is for each permutation, as a unit vector: `[letters, degree]`."""
        permuted = torch.zeros(len(letters), len(begins), self.degree, dtype=DOUBLE)
        permuted.scatter_(2, letters[:, None].expand_as(permuted), begins.expand_as(permuted))
        read = torch.zeros(len(letters), self.degree, dtype=DOUBLE)
        read[:, : len(begins)] = permuted @ query
        return F.normalize(read, dim=-1)

    @torch.no_grad()
    def forward(self, tokens: Tensor) -> Tensor:
        """tokens `[B, L]` -> logits `[B, L, letters]`."""
        return self.layer(F.one_hot(tokens, self.letters + 1).to(DOUBLE))[..., :-1]

    def right(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Which answers are right, for words without the token that begins them: bool `[B, L]`."""
        begun = F.pad(tokens, (1, 0), value=self.letters)
        return self(begun)[:, 1:].argmax(-1) == labels


def orbit(word: Tensor, beta: float) -> Tensor:
    """The state of a machine for S3 in the plane that no letter leaves, after each letter of `word`: `[L + 1, 2]`.

    beta: of each swap.

    >>> orbit(torch.tensor([1, 1]), 2.0).round(decimals=6).abs().tolist()[0]
    [1.0, 0.0]
    """
    k, strength = permutation_steps(permutations_of(3)[word])
    plane = F.normalize(torch.tensor([[1.0, 0, -1], [1, -2, 1]], dtype=DOUBLE), dim=1)
    S, states = plane[0][:, None], [plane[0]]
    for t in range(len(word)):
        one, zero = torch.zeros(1, 3, dtype=DOUBLE), torch.zeros(1, 2, 1, dtype=DOUBLE)
        S = recurrent_delta_product(one, k[t : t + 1], zero, strength[t : t + 1] / 2 * beta, initial_state=S)[1]
        states.append(S[:, 0])
    return torch.stack(states) @ plane.T


def accuracies(
    degree: int, tops: Sequence[float], tokens: Tensor, labels: Tensor, steps: int | None = None
) -> dict[float, Tensor]:
    """The share of right answers at each position, `[L]`, of a machine made by hand for each range of beta."""
    machines = {top: WordMachine(degree, steps=steps, top=top) for top in tops}
    return {top: machine.right(tokens, labels).double().mean(0) for top, machine in machines.items()}


# --- Groups ----------------------------------------------------------------------------------------------
def generated(generators: Tensor, most: int = 200) -> Tensor:
    """All products of the matrices `generators` `[m, d, d]`, each once, the identity first: `[order, d, d]`.

    Raises ValueError for a group of more than `most` elements.

    >>> len(generated(torch.tensor([[[0.0, -1.0], [1.0, 0.0]]])))
    4
    """
    found = [torch.eye(generators.shape[-1], dtype=generators.dtype)]
    for element in found:  # grows while it is read
        for product in generators @ element:
            if all((product - known).abs().max() > 1e-6 for known in found):
                found.append(product)
        if len(found) > most:
            raise ValueError(f"generators must make a group of at most {most} elements")
    return torch.stack(found)


def permutation_matrices(letters: Tensor) -> Tensor:
    """Row i is carried to row `letters[x, i]`: integers `[n, d]` -> `[n, d, d]`."""
    return F.one_hot(letters, letters.shape[-1]).to(DOUBLE).mT


def groups() -> dict[str, Tensor]:
    """Groups as matrices, by name: permutations of 3, 4 and 5 things, rotations of a cube and of an icosahedron."""
    even = [p for p in permutations_of(5).tolist() if sum(a > b for a, b in itertools.combinations(p, 2)) % 2 == 0]
    turn = torch.tensor([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]], dtype=DOUBLE)
    shift = torch.tensor([[0.0, 0, 1], [1, 0, 0], [0, 1, 0]], dtype=DOUBLE)
    golden = (1 + 5**0.5) / 2
    fifth = torch.tensor([[1, -golden, golden - 1], [golden, golden - 1, -1], [golden - 1, 1, golden]], dtype=DOUBLE)
    return {
        "S3": permutation_matrices(permutations_of(3)),
        "S4": permutation_matrices(permutations_of(4)),
        "S4, as turns of a cube": generated(torch.stack([turn, shift])),
        "A5": permutation_matrices(torch.tensor(even)),
        "A5, as turns of an icosahedron": generated(torch.stack([fifth / 2, shift])),
        "S5": permutation_matrices(permutations_of(5)),
    }


def steps_needed(matrices: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """For each group: how many of its elements need 0, 1, 2, ... steps at least."""
    return {name: torch.bincount(fewest_steps(M), minlength=5).tolist() for name, M in matrices.items()}


# --- Least squares ---------------------------------------------------------------------------------------
def errors_of_one_pass(keys: Tensor, values: Tensor, ridge: float = 1e-6) -> dict[str | int, float]:
    """`recall_errors` after 1, 5 and 20 sweeps of the delta rule, with "recursive": least squares in one sweep.

    keys `[..., n, d_k]`, values `[..., n, d_v]`.
    """
    found = recall_errors(keys, values)
    ones = torch.ones(keys.shape[:-1], dtype=keys.dtype)
    S = recursive_least_squares(keys, keys, values, ones, ridge=ridge)[1][0]
    return found | {"recursive": (keys @ S - values).square().sum(-1).mean().item()}


def answers_to_one_key(betas: Sequence[float], writes: int, ridge: float = 1.0) -> dict[str, Tensor]:
    """What the memory answers after 0, 1, ..., `writes` writes of the value 0 under one key, from the answer 1.

    By the delta rule for each of `betas`, and by least squares.
    """
    one, start = torch.ones(writes, 1, dtype=DOUBLE), torch.ones(1, 1, dtype=DOUBLE)
    curves: dict[str, Tensor] = {}
    for beta in betas:
        k, b = one[:, None], torch.full((writes, 1), beta, dtype=DOUBLE)
        o, _ = recurrent_delta_product(one, k, 0 * k, b, scale=1.0, initial_state=start)
        curves[f"delta rule, $\\beta$ = {beta:g}"] = torch.cat([start[0], o[:, 0]])
    pair = start, start / ridge
    o, _ = recursive_least_squares(one, one, 0 * one, one[:, 0], scale=1.0, initial_state=pair)
    return curves | {"least squares": torch.cat([start[0], o[:, 0]])}


# --- Learning from two starts ----------------------------------------------------------------------------
class Pairs(nn.Module):
    """A memory for pairs: each token is the sum of a key's and a value's vector, or a key's alone when it asks.

    layer: a mixer of `width` channels.  keys, values `[B, L]` -> logits of the values `[B, L, names]`; the value
    `names` stands for none.
    """

    def __init__(self, layer: Mixer, names: int, width: int):
        super().__init__()
        self.key, self.value = nn.Embedding(names, width), nn.Embedding(names + 1, width)
        self.layer, self.head = layer, nn.Linear(width, names)

    def forward(self, keys: Tensor, values: Tensor) -> Tensor:
        x = self.key(keys) + self.value(values)
        return self.head(self.layer(x * x.square().mean(-1, keepdim=True).rsqrt()))


def draw_pairs(
    n: int, pairs: int, names: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`pairs` different keys with a value each, then the keys again in another order, which ask.

    Returns keys and values `[n, 2 pairs]` and the answers `[n, pairs]`.

    >>> keys, values, answers = draw_pairs(1, 4, 16)
    >>> keys.shape, bool((values[:, 4:] == 16).all())
    (torch.Size([1, 8]), True)
    """
    keys = torch.rand(n, names, generator=generator).argsort(1)[:, :pairs]
    values = torch.randint(names, (n, pairs), generator=generator)
    order = torch.rand(n, pairs, generator=generator).argsort(1)
    asked = torch.cat([keys, keys.gather(1, order)], 1)
    return asked, F.pad(values, (0, pairs), value=names), values.gather(1, order)


def learned(
    make: Callable[[], Mixer],
    parts: Collection[str],
    *,
    seed: int,
    steps: int,
    learning_rate: float,
    width: int = 32,
    pairs: int = 8,
    names: int = 32,
    batch: int = 32,
    device: str = "cpu",
) -> list[float]:
    """The accuracy at every step of training on fresh pairs, where `mimetic_` has set `parts` of the layer first.

    make: returns a layer of `width` channels.  Seeds of the weights and of the pairs are the same for all `parts`.
    """
    torch.manual_seed(seed)
    layer, generator = make(), torch.Generator().manual_seed(seed)
    model = Pairs(mimetic_(layer, parts) if parts else layer, names, width).to(device)
    optimiser = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    history: list[float] = []
    for _ in range(steps):
        keys, values, answers = (x.to(device) for x in draw_pairs(batch, pairs, names, generator))
        logits = model(keys, values)[:, pairs:]
        optimiser.zero_grad()
        F.cross_entropy(logits.flatten(0, 1), answers.flatten()).backward()
        optimiser.step()
        history.append((logits.argmax(-1) == answers).float().mean().item())
    return history


def steps_until(history: Sequence[float], level: float = 0.9, over: int = 10) -> int | None:
    """After how many steps the mean of the last `over` accuracies reaches `level`; None if it never does.

    >>> steps_until([0.5] * 20 + [1.0] * 20, over=1), steps_until([0.5] * 20)
    (21, None)
    """
    means = (sum(history[n - over : n]) / over for n in range(over, len(history) + 1))
    return next((n + over for n, mean in enumerate(means) if mean >= level), None)


# --- What a GPU measures ---------------------------------------------------------------------------------
def words_table(record: dict[str, Any] | None) -> Table:
    """Scaled accuracy on words of S3 and S5 beyond the training length, by steps and range of beta.

    record: `book/results/reproduce.json`, or None.

    >>> words_table(None)
    not measured yet; on a GPU: python -m experiments reproduce tracking --cells 's3-*' 's5-*'
    """
    head = ("group", "steps", "largest beta", "scaled accuracy of each seed (%)")
    cells = (record or {}).get("results", {}).get("tracking", {}).get("cells", {})
    rows = [
        (
            place["task"].upper(), str(place["delta_steps"]), f"{place['beta_range']:g}",
            _seeds([100 * x for x in cell["best"]["score"]]),
        )
        for cell in cells.values()
        if (place := cell["place"]).get("task") in ("s3", "s5")
    ]  # fmt: skip
    return Table(head, rows, empty=f"not measured yet; on a GPU: {WORDS}")


def starts_table(record: dict[str, Any] | None) -> Table:
    """Steps until 99% of copying and recall from the two starts, for each mixer at its best rate.

    record: `book/results/expressiveness.json`, or None.

    >>> starts_table(None)
    not measured yet; on a GPU: python -m experiments expressiveness
    """
    head = ("task", "mixer", "start", "rate", "steps to 99% of each seed", "accuracy at the end (%)")
    rows = [
        (
            row["task"], row["mixer"], row["start"], f"{row['learning_rate']:g}",
            " ".join("never" if steps is None else str(steps) for steps in row["steps"]),
            _seeds([100 * x for x in row["accuracy"]]),
        )
        for row in (record or {}).get("results", [])
    ]  # fmt: skip
    return Table(head, rows, empty=f"not measured yet; on a GPU: {STARTS}")


def _seeds(numbers: Sequence[float]) -> str:
    return " ".join(f"{x:.1f}" for x in numbers)
