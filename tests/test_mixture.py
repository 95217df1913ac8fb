# SPDX-License-Identifier: Apache-2.0
import dataclasses
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from di_star_jax import diffusion
from di_star_jax.errors import UserError
from di_star_jax.studies import mixture


def test_exact_samples_have_no_divergence_and_the_right_modes():
    measured = mixture.measure(np.asarray(mixture.sample_mixture(jax.random.key(0), 200_000)))
    assert measured["kl"] < 0.02 and measured["outside"] < 1e-3
    np.testing.assert_allclose(
        measured["modes"], mixture.MODE_WEIGHTS, atol=0.03
    )  # nearest is not quite which


def test_exact_noise_prediction_is_the_mean_noise_given_x_t():
    # Among samples of (x0, eps) that land near one x_t, the mean eps is the prediction.
    x0, eps = (
        mixture.sample_mixture(jax.random.key(1), 2_000_000),
        jax.random.normal(jax.random.key(2), (2_000_000, 2)),
    )
    t = jnp.full(len(x0), 500)
    x_t = diffusion.add_noise(x0, eps, mixture.SCHEDULE.alpha[t], mixture.SCHEDULE.sigma[t])
    point = jnp.array([0.4, -0.3])
    near = jnp.linalg.norm(x_t - point, axis=-1) < 0.1
    np.testing.assert_allclose(
        mixture.exact_eps(point[None], jnp.array([500]))[0], eps[near].mean(0), atol=0.02
    )


@pytest.mark.parametrize(
    "name",
    [
        name if name == "di_star" else pytest.param(name, marks=pytest.mark.long)
        for name in mixture.METHODS
    ],
)
def test_every_method_trains(name):
    settings = dataclasses.replace(mixture.SETTINGS, **mixture.METHODS[name])
    start = mixture.init_network(0)
    trained = mixture.train(start, settings, 1.0, steps=2)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(trained))
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(start), jax.tree.leaves(trained)))


def test_steps_in_chunks_are_the_steps_in_a_row():
    def update(state, k):
        return state * 1.001 + k

    straight = 0.0
    for k in range(mixture.CHUNK + 7):
        straight = straight * 1.001 + k
    found = mixture.run_steps(update, jnp.zeros(()), mixture.CHUNK + 7)
    np.testing.assert_allclose(found, straight, rtol=1e-4)


@pytest.mark.case("first hour 24")
def test_all_that_is_missing_is_said_at_once_and_before_the_training(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    given = SimpleNamespace(out=str(tmp_path / "file"), steps=1)
    monkeypatch.setattr(mixture, "flags", SimpleNamespace(FLAGS=given))
    with pytest.raises(UserError, match="pip install matplotlib.*; also --out=.*it is a file"):
        mixture.main()


@pytest.mark.case("first hour 20")
def test_the_picture_says_what_its_cross_is(monkeypatch, tmp_path):
    figure = pytest.importorskip("matplotlib.figure")
    drawn = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *a, **k: drawn.append(self))
    names = [f"{name} | {scale:g}" for name in mixture.METHODS for scale in mixture.REWARD_SCALES]
    mixture.figure(dict.fromkeys(["mixture | -", *names], np.zeros((3, 2))), tmp_path / "a.png")
    texts = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert texts[0] == "where the reward is highest" and "samples" in texts[1]
