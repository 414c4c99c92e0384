"""The figures of chapter 1: what is drawn is what the package computes, and every drawing can be drawn."""

from io import BytesIO

import matplotlib.pyplot as plt
import pytest
import torch
from PIL import Image

from dn_lib.forms import linear_attention as la
from dn_lib.teaching import plotting
from dn_lib.teaching.figures import ch1


@pytest.fixture(autouse=True)
def own_style():
    with plt.rc_context():
        plotting.use_style()
        yield
    plt.close("all")


def test_mechanisms_differ_by_colour_by_marker_and_by_line_style():
    for key in ("color", "marker", "linestyle"):
        assert len({str(style[key]) for style in plotting.MECHANISMS.values()}) == len(plotting.MECHANISMS) == 5


def test_series_that_are_no_mechanism_have_no_mechanisms_colour():
    for key in ("color", "marker", "linestyle"):
        assert len({str(style[key]) for style in plotting.OTHERS}) == len(plotting.OTHERS) == 3
    mechanisms = {style["color"] for style in plotting.MECHANISMS.values()}
    assert not mechanisms & {style["color"] for style in plotting.OTHERS}


def test_the_story_of_a_state_ends_with_interference():
    frames = ch1.state_story()
    assert len(frames) == len(ch1.STORY_TITLES)
    states = torch.stack([frame["state"] for frame in frames])
    assert torch.equal(states[0], torch.zeros(3, 4).double())
    assert torch.allclose(states[-1], ch1.STORY_KEYS.T @ ch1.STORY_VALUES)
    v1, v2, v3 = ch1.STORY_VALUES
    reads = [frame["value"] for frame in frames if frame["reads"]]
    for read, value in zip(reads, (v1, v2, v1 + 0.6 * v3), strict=True):  # as the titles say
        assert torch.allclose(read, value)


@pytest.mark.parametrize("make", [ch1.state_animation, ch1.three_forms_animation])
def test_animations_move_have_a_still_and_are_small(make):
    shown = make()
    picture = Image.open(BytesIO(shown.data))
    assert picture.is_animated and picture.size[0] == round(plotting.WIDTH * plotting.STYLE["figure.dpi"])
    assert len(shown.data) < 300_000
    assert plt.get_fignums() == []


def test_the_still_of_an_animation_is_its_own_drawing():
    shown = plotting.animation(
        lambda fig, n: fig.text(0.5, 0.5, str(n)), range(2), still=lambda fig: fig.text(0.5, 0.5, "still"), height=1
    )
    picture, pages = Image.open(BytesIO(shown.data)), []
    for page in range(3):
        picture.seek(page)
        pages.append(picture.convert("RGB").tobytes())
    assert len(set(pages)) == 3


@pytest.mark.parametrize(("length", "chunk"), [(12, 4), (7, 3)])
def test_every_form_deals_with_each_pair_of_the_past_once(length, chunk):
    forms = ch1.form_steps(length, chunk)
    past = torch.ones(length, length).tril().bool()
    for steps, scores in forms.values():
        assert torch.equal(steps > 0, past)
        assert not (scores & ~past).any()
    assert [int(steps.max()) for steps, _ in forms.values()] == [length, 1, -(-length // chunk)]
    steps, scores = forms["chunkwise"]
    # A score joins tokens of one chunk; what comes through the state was written by an earlier step.
    written = steps.diagonal()[None, :].expand(length, length)
    assert (written[past & ~scores] < steps[past & ~scores]).all()
    assert (written[past & scores] == steps[past & scores]).all()


def test_pictures_of_letters_differ():
    pictures = ch1.letter_pictures(68)
    assert pictures.shape == (68, 196) and pictures.dtype == torch.float64
    assert pictures.abs().max() <= 1
    assert torch.equal(pictures[0], pictures[2])  # the two M of MEMORY
    assert len(pictures.unique(dim=0)) == 62


def test_recall_animation_shows_what_it_is_given():
    counts = [6, 64, 512]
    pictures = ch1.letter_pictures(6)
    shown = ch1.recall_animation(counts, [pictures] * 3, [0.1, 1.0, 8.0], d=64)
    assert Image.open(BytesIO(shown.data)).is_animated and len(shown.data) < 300_000


def test_capacity_draws_measurement_prediction_and_both_bests():
    counts, d = [1, 8, 64], 64
    additive = {16: [0.0, 0.5, 4.0], 64: [0.0, 0.1, 1.0], 256: [0.0, 0.03, 0.25]}
    left, right = ch1.capacity(counts, additive, [0.0, 0.0, 0.0], d).axes
    assert [list(line.get_ydata()) for line in left.lines[::2]] == [[(n - 1) / w for n in counts] for w in additive]
    colours = [line.get_color() for line in right.lines]
    assert plotting.MECHANISMS["linear"]["color"] in colours and plotting.MECHANISMS["ideal"]["color"] in colours


def test_decoding_marks_the_first_length_at_which_the_cache_is_as_large():
    fig = ch1.decoding([16, 32, 64], [(1, 2), (2, 2), (4, 2)], [(1.0, 2.0)] * 3)
    assert list(fig.axes[0].lines[-1].get_xdata()) == [32, 32]


def test_decay_factors_leave_the_future_blank_and_have_a_colour_bar():
    fig = ch1.decay_factors({"none": torch.ones(4, 4), "some": torch.full((4, 4), 0.5)})
    assert len(fig.axes) == 3  # two panels, and the bar
    shown = fig.axes[1].images[0].get_array()
    assert torch.equal(torch.tensor(shown).isnan(), torch.ones(4, 4).triu(1).bool())
    assert fig.axes[0].get_xlabel() and fig.axes[0].get_ylabel() and fig.axes[2].get_ylabel()


def test_matrices_on_one_scale():
    _, (a, b) = plotting.figure(columns=2)
    assert plotting.matrix(a, torch.ones(2, 2), limit=4.0).get_clim() == (-4, 4)
    assert plotting.matrix(b, torch.ones(2, 2), cmap="sequential", limit=2.0).get_clim() == (0, 2)


def test_the_other_figures_can_be_drawn():
    ch1.taylor_features([0.7, 0.5], [1, 7], [1, 7], tokens=200)
    ch1.times([64, 128], {"a": [1.0, 2.0], "b": [1.0, 2.0], "c": [1.0, 2.0]}, 64)
    ch1.valley([4, 8], torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]))
    fig = ch1.normaliser(torch.randn(8), {name: torch.rand(8) + 1 for name in ("x", "y", "z")})
    fig.canvas.draw()


def test_kept_for_backward_counts_states_and_scores():
    length, d = 32, 4
    inputs = [torch.randn(length, d, requires_grad=True) for _ in range(3)]
    states = ch1.kept_for_backward(la.recurrent_linear_attention, *inputs)
    scores = ch1.kept_for_backward(la.parallel_linear_attention, *inputs)
    assert states >= length * d * d and scores >= length * length
