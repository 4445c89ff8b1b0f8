"""The figures of the guide: their numbers, that nothing overlaps, that saving is all or nothing."""

import itertools

import jax
import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

import figures
from figures import gradient
from forwax.lab import style

DIAGRAMS = [figures.forward_step, figures.backward_step, figures.forward_gradient]


def _texts(figure):
    """Return every text and title of the figure that is not empty, but for tick labels."""
    children = [child for axes in figure.axes for child in axes.get_children()]
    return [
        child
        for child in children
        if isinstance(child, matplotlib.text.Text) and child.get_text().strip()
    ]


@pytest.mark.parametrize("draw", DIAGRAMS)
def test_texts_lie_inside_and_apart(draw):
    figure = draw()
    renderer = FigureCanvasAgg(figure).get_renderer()
    boxes = [
        text.get_window_extent(renderer)
        for text in _texts(figure)
        if not text.get_rotation()
    ]
    assert len(boxes) >= 5
    for box in boxes:
        assert figure.bbox.x0 <= box.x0 <= box.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= box.y0 <= box.y1 <= figure.bbox.y1
    for one, other in itertools.combinations(boxes, 2):
        assert not one.overlaps(other)


def test_forward_step_shows_the_numbers_of_jvp():
    texts = {text.get_text() for text in _texts(figures.forward_step())}
    assert {"$z = 2$", r"$\dot{z} = 1$", "$L = 1$", r"$\dot{L} = 2$"} <= texts
    assert r"forward gradient $\dot L\,v = ({2}, {-2})$" in texts


def test_backward_step_shows_the_gradient():
    texts = {text.get_text() for text in _texts(figures.backward_step())}
    assert {
        r"$\bar{w} = 4$",
        r"$\bar{b} = 2$",
        r"$\bar{z} = 2$",
        r"$\bar{h} = 2$",
        r"$\bar{L} = 1$",
    } <= texts


def test_forward_gradient_is_computed():
    true, estimates = gradient._estimates(jax.random.key(3))
    np.testing.assert_allclose(true, [0.9, 1.5], rtol=1e-6)
    assert np.all(estimates @ true >= 0)
    # The standard error of the mean is |g| √(3 / 4096), 0.05; five of them.
    assert np.linalg.norm(estimates.mean(axis=0) - true) < 0.25
    direction, slope = gradient._legible(true, estimates)
    np.testing.assert_allclose(direction @ true, slope, rtol=1e-5)


def test_forward_gradient_depends_on_its_key():
    one, other = (figures.forward_gradient(jax.random.key(seed)) for seed in (0, 1))
    assert {text.get_text() for text in _texts(one)} != {
        text.get_text() for text in _texts(other)
    }


def test_save_all_writes_three_pictures_and_leaves_the_settings(tmp_path):
    before = dict(matplotlib.rcParams)
    paths = figures.save_all(tmp_path / "new" / "pictures")
    assert [path.name for path in paths] == [
        "forward-step.png",
        "backward-step.png",
        "forward-gradient.png",
    ]
    assert sorted(paths) == sorted((tmp_path / "new" / "pictures").iterdir())
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    assert dict(matplotlib.rcParams) == before


def test_save_leaves_the_old_picture_when_it_fails(tmp_path):
    path = tmp_path / "curves.png"
    path.write_bytes(b"old")
    figure = style.new_figure(2, 1)
    figure.text(0.5, 0.5, r"$\nonsense{$")
    with pytest.raises(ValueError, match="nonsense"):
        style.save(figure, path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_save_asks_for_a_suffix(tmp_path):
    with pytest.raises(
        ValueError, match=r"needs a suffix such as \.png, \.svg or \.pdf"
    ):
        style.save(style.new_figure(2, 1), tmp_path / "curves")
