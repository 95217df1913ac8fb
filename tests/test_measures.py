# SPDX-License-Identifier: Apache-2.0
"""Numbers of an evaluation against scipy, closed forms and simulations."""

import io
import tracemalloc

import numpy as np
import pytest
from scipy import linalg

from di_star_jax.errors import UserError
from di_star_jax.evaluation import measures, picks, statistics
from di_star_jax.evaluation.frechet import FeatureStatistics, frechet_distance
from di_star_jax.shapes import scenes

NAN = np.nan
pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")  # a NaN is meant, and never 0 / 0


def moments(*batches, features="tiny, 299 px"):
    found = FeatureStatistics(features)
    for batch in batches:
        found.update(batch)
    return found


def correlated(rng, n, d, shift=0.0):
    return rng.standard_normal((n, d)) @ rng.standard_normal((d, d)) / d**0.5 + shift


# FeatureStatistics


@pytest.mark.parametrize("sizes", [[500], [1, 499], [0, 7, 0, 250, 243], [1] * 500])
def test_statistics_of_batches_are_those_of_all_rows(sizes):
    x = correlated(np.random.default_rng(0), 500, 6).astype(np.float32)
    found = moments(*np.split(x, np.cumsum(sizes)[:-1]))
    assert found.count == 500 and found.mean.dtype == found.cov.dtype == np.float64
    np.testing.assert_allclose(found.mean, x.astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.cov, np.cov(x.astype(np.float64), rowvar=False), rtol=1e-11)


def test_merged_statistics_are_those_of_all_rows():
    x = correlated(np.random.default_rng(1), 300, 5)
    parts = [moments(part) for part in np.split(x, [40, 40, 200])]
    whole = moments()
    for part in parts:
        whole.merge(part)
    assert whole.count == 300 and parts[0].count == 40
    np.testing.assert_allclose(whole.cov, np.cov(x, rowvar=False), rtol=1e-12)


def test_covariance_far_from_the_origin_keeps_its_digits():
    # The sum of squares minus the square of the sum would lose all of them: 1e8 ** 2 * eps is 2.
    x = correlated(np.random.default_rng(2), 1000, 4)
    found = moments(*np.split(x + 1e8, 10))
    np.testing.assert_allclose(found.cov, np.cov(x, rowvar=False), rtol=1e-6, atol=1e-7)


def test_broken_rows_are_left_out_and_counted():
    x = correlated(np.random.default_rng(3), 50, 4)
    broken = x.copy()
    broken[[3, 10, 49], [0, 1, 3]] = NAN, np.inf, NAN
    found = moments(broken[:20], broken[20:], np.full((2, 4), NAN))
    assert (found.count, found.left_out) == (47, 5)
    np.testing.assert_allclose(found.cov, np.cov(np.delete(x, [3, 10, 49], axis=0), rowvar=False))


def test_saved_statistics_come_back_and_grow_on(tmp_path):
    x = correlated(np.random.default_rng(4), 90, 5)
    path = tmp_path / "real.stats"
    moments(x[:60], np.full((1, 5), NAN)).save(path)
    found = FeatureStatistics.load(path, "tiny, 299 px")
    assert (found.count, found.left_out) == (60, 1)
    found.update(x[60:])
    np.testing.assert_allclose(found.cov, np.cov(x, rowvar=False), rtol=1e-12)
    np.testing.assert_allclose(found.mean, x.mean(0), rtol=1e-12)


def test_saved_statistics_are_readable_as_pytorch_fid_reads_them(tmp_path):
    x = correlated(np.random.default_rng(5), 60, 5)
    moments(x).save(tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as file:
        np.testing.assert_allclose(file["mu"][:], x.mean(0))
        np.testing.assert_allclose(file["sigma"][:], np.cov(x, rowvar=False))


def test_a_pytorch_fid_file_serves_as_reference_but_cannot_grow(tmp_path):
    x, y = (correlated(np.random.default_rng(i), 60, 5) for i in (6, 7))
    np.savez(tmp_path / "a.npz", mu=x.mean(0), sigma=np.cov(x, rowvar=False))
    found = FeatureStatistics.load(tmp_path / "a.npz", "tiny, 299 px")
    assert found.count is None
    assert frechet_distance(found, moments(y)) == pytest.approx(
        frechet_distance(moments(x), moments(y)), rel=1e-12
    )
    for refused in (lambda: found.update(x), lambda: moments(x).merge(found)):
        with pytest.raises(UserError, match="cannot grow"):
            refused()
    with pytest.raises(UserError, match="without a count"):
        found.save(tmp_path / "b.npz")


def npz(**arrays):
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def npy():
    buffer = io.BytesIO()
    np.save(buffer, np.eye(3))
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "not readable as .npz"),
        (b"", "not readable as .npz"),
        (b"some text", "not readable as .npz"),
        (npy(), "not readable as .npz"),
        (npz(mu=np.zeros(3), sigma=np.eye(3))[:-40], "not readable as .npz"),
        (npz(mu=np.array([None, 1], dtype=object), sigma=np.eye(2)), "not readable as .npz"),
        (npz(), "holds nothing, expected mu"),
        (npz(mean=np.zeros(3), cov=np.eye(3)), r"holds mean \[3\], cov \[3, 3\], expected mu"),
        (npz(mu=np.zeros(3), sigma=np.eye(4)), r"holds mu \[3\], sigma \[4, 4\], expected mu"),
        (npz(mu=np.zeros(3), sigma=np.full((3, 3), NAN)), "NaN or infinite"),
        (
            npz(mu=np.zeros(3), sigma=np.eye(3), features="CLIP, 224 px"),
            "is of 'CLIP, 224 px', expected 'tiny, 299 px'",
        ),
    ],
)
def test_a_file_that_is_no_statistics_of_these_features_is_refused_in_one_line(
    tmp_path, content, message
):
    if content is not None:
        (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        FeatureStatistics.load(tmp_path / "a.npz", "tiny, 299 px")
    assert "\n" not in str(error.value)


def test_statistics_that_do_not_belong_together_are_refused():
    x = np.random.default_rng(8).standard_normal((10, 3))
    with pytest.raises(UserError, match="'tiny, 299 px' and of 'CLIP'"):
        frechet_distance(moments(x), moments(x, features="CLIP"))
    with pytest.raises(UserError, match="features of 3 and of 2 dimensions"):
        moments(x, x[:, :2])
    with pytest.raises(UserError, match="statistics of 1 images, expected 2"):
        frechet_distance(moments(x), moments(x[:1]))


# frechet_distance


def with_sqrtm(x, y):
    cov_x, cov_y = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = linalg.sqrtm(cov_x @ cov_y).real
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(cov_x + cov_y - 2.0 * root)


@pytest.mark.parametrize(
    "d, n, m", [(2, 50, 30), (16, 500, 100), (128, 400, 2000), (256, 600, 450)]
)
def test_frechet_distance_equals_its_definition_with_sqrtm(d, n, m):
    rng = np.random.default_rng(d)
    x, y = correlated(rng, n, d), correlated(rng, m, d, shift=0.1)
    assert frechet_distance(moments(x), moments(y)) == pytest.approx(with_sqrtm(x, y), rel=1e-9)


@pytest.mark.parametrize("d, n, m", [(64, 20, 30), (256, 100, 50), (64, 20, 200)])
def test_frechet_distance_with_fewer_images_than_dimensions(d, n, m):
    # tr (C_x C_y)^(1/2) is the sum of singular values of X Y^T for centred X, Y: no covariance, no
    # root of zero.
    rng = np.random.default_rng(d + m)
    x, y = correlated(rng, n, d), correlated(rng, m, d, shift=0.1)
    centred_x, centred_y = (x - x.mean(0)) / (n - 1) ** 0.5, (y - y.mean(0)) / (m - 1) ** 0.5
    expected = (
        ((x.mean(0) - y.mean(0)) ** 2).sum()
        + (centred_x**2).sum()
        + (centred_y**2).sum()
        - 2.0 * linalg.svdvals(centred_x @ centred_y.T).sum()
    )
    assert frechet_distance(moments(x), moments(y)) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(moments(x), moments(y)) == pytest.approx(with_sqrtm(x, y), rel=1e-5)


def test_frechet_distance_of_nearly_equal_sets():
    rng = np.random.default_rng(9)
    x = correlated(rng, 1000, 64)
    noisy = x + 1e-2 * rng.standard_normal(x.shape)
    assert frechet_distance(moments(x), moments(noisy)) == pytest.approx(
        with_sqrtm(x, noisy), rel=1e-6
    )
    assert 0.0 <= frechet_distance(moments(x), moments(x[::-1])) < 1e-9
    few = x[:10]  # rank 9 of 64
    assert 0.0 <= frechet_distance(moments(few), moments(few)) < 1e-6


def test_frechet_distance_of_equal_covariances_is_the_squared_distance_of_the_means():
    x = correlated(np.random.default_rng(10), 200, 8)
    shift = np.arange(8) / 10.0
    assert frechet_distance(moments(x), moments(x + shift)) == pytest.approx(
        (shift**2).sum(), rel=1e-9
    )


def test_frechet_distance_in_one_dimension_and_of_scaled_sets():
    x, y = np.random.default_rng(11).standard_normal((2, 300, 1)) * [[[2.0]], [[0.5]]]
    expected = (x.mean() - y.mean()) ** 2 + (x.std(ddof=1) - y.std(ddof=1)) ** 2
    assert frechet_distance(moments(x), moments(y)) == pytest.approx(expected, rel=1e-9)
    z = correlated(np.random.default_rng(12), 300, 8)
    z -= z.mean(0)
    assert frechet_distance(moments(z), moments(3.0 * z)) == pytest.approx(
        4.0 * np.trace(np.cov(z, rowvar=False)), rel=1e-9
    )


# summary, by_group


def test_summary_is_a_mean_of_prompt_means_with_its_error_over_prompts():
    found = statistics.summary([[1.0, 3.0], [4.0, NAN], [NAN, NAN], [6.0, 6.0]])
    assert found.mean == pytest.approx((2 + 4 + 6) / 3)
    assert found.stderr == pytest.approx(2.0 / 3**0.5)
    assert (found.prompts, found.images, found.left_out) == (3, 5, 3)
    assert statistics.summary([2.0, 4.0, 6.0])[:2] == found[:2]


def test_copies_of_an_image_do_not_shrink_the_standard_error():
    values = np.random.default_rng(13).standard_normal((40, 1))
    assert statistics.summary(np.repeat(values, 8, axis=1)).stderr == pytest.approx(
        statistics.summary(values).stderr
    )


def test_summary_of_one_prompt_and_of_none():
    one = statistics.summary([[1.0, 2.0]])
    assert one.mean == 1.5 and np.isnan(one.stderr) and one[2:] == (1, 2, 0)
    for values, left_out in (
        (np.full((2, 3), NAN), 6),
        (np.zeros((0, 4)), 0),
        (np.zeros((2, 0)), 0),
        ([], 0),
    ):
        none = statistics.summary(values)
        assert np.isnan(none.mean) and np.isnan(none.stderr) and none[2:] == (0, 0, left_out)


def test_categories_are_summed_up_one_by_one_in_order_of_appearance():
    values = np.array([[1.0], [10.0], [3.0], [NAN]])
    found = statistics.by_group(values, ["photo", "anime", "photo", "anime"])
    assert list(found) == ["photo", "anime"]
    assert found["photo"] == statistics.summary([1.0, 3.0]) and found["anime"][0] == 10.0
    assert found["anime"][2:] == (1, 1, 1)
    with pytest.raises(UserError, match="4 prompts and 1 categories"):
        statistics.by_group(values, ["photo"])


# paired


def test_paired_counts_wins_ties_and_pairs_that_are_readable_on_both_sides():
    a = np.array([[1.0, 3.0], [0.0, NAN], [2.0, 2.0], [NAN, 5.0], [0.0, 1.0]])
    b = np.array([[0.0, 0.0], [5.0, 1.0], [1.0, 3.0], [0.0, NAN], [1.0, 1.0]])
    found = statistics.paired(a, b)
    assert found.difference == pytest.approx(np.mean([2.0, -5.0, 0.0, -0.5]))
    assert found.win_rate == (1 + 0 + 0.5 + 0) / 4
    assert (found.prompts, found.pairs, found.left_out) == (4, 7, 3)


def test_paired_is_antisymmetric_and_reproducible():
    a, b = np.random.default_rng(15).standard_normal((2, 100, 2))
    found, mirrored = statistics.paired(a, b, seed=1), statistics.paired(b, a, seed=1)
    assert found == statistics.paired(a, b, seed=1) != statistics.paired(a, b, seed=2)
    np.testing.assert_allclose(
        [mirrored.difference, mirrored.low, mirrored.high, mirrored.win_rate],
        [-found.difference, -found.high, -found.low, 1.0 - found.win_rate],
        rtol=1e-9,
    )


def test_bootstrap_interval_is_that_of_prompts_drawn_with_replacement_and_of_the_normal_law():
    difference = np.random.default_rng(16).normal(0.1, 1.0, 400)
    found = statistics.paired(difference, np.zeros(400))
    drawn = difference[np.random.default_rng(1).integers(0, 400, (10_000, 400))]
    error = difference.std() / 20.0
    np.testing.assert_allclose(
        [found.low, found.high],
        np.percentile(drawn.mean(axis=1), [2.5, 97.5]),
        atol=0.1 * error,
    )
    np.testing.assert_allclose(
        [found.low, found.high],
        difference.mean() + np.array([-1.96, 1.96]) * error,
        atol=0.1 * error,
    )
    wins = (difference > 0).mean()
    np.testing.assert_allclose(
        [found.win_low, found.win_high],
        wins + np.array([-1.96, 1.96]) * (wins * (1 - wins)) ** 0.5 / 20.0,
        atol=0.005,
    )


def test_difference_and_win_rate_are_of_the_same_drawn_prompts():
    difference = np.random.default_rng(20).choice([-1.0, 1.0], 50)  # so that wins = (d + 1) / 2
    found = statistics.paired(difference, np.zeros(50))
    np.testing.assert_allclose(
        [found.win_low, found.win_high], (np.array([found.low, found.high]) + 1) / 2, rtol=1e-12
    )


def test_bootstrap_interval_covers_the_truth_19_times_of_20():
    rng = np.random.default_rng(17)
    covered = 0
    for seed in range(400):
        prompt = rng.normal(0.3, 1.0, (60, 1))  # common to the four samples of a prompt
        found = statistics.paired(
            prompt + rng.normal(0.0, 0.3, (60, 4)), np.zeros((60, 4)), seed=seed, resamples=500
        )
        covered += found.low <= 0.3 <= found.high
    assert 0.91 <= covered / 400 <= 0.97


def test_bootstrap_in_chunks_is_the_bootstrap_at_once(monkeypatch):
    a, b = np.random.default_rng(18).standard_normal((2, 50))
    whole = statistics.paired(a, b)
    monkeypatch.setattr(statistics, "_CHUNK", 1000)
    np.testing.assert_allclose(statistics.paired(a, b), whole, rtol=1e-12)


def test_bootstrap_of_thirty_thousand_prompts_fits_in_100_mb():
    values = np.random.default_rng(19).standard_normal(30_000)
    tracemalloc.start()
    statistics.paired(values, np.zeros(30_000), resamples=300)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6


def test_paired_refuses_different_shapes_and_has_no_interval_of_one_prompt():
    with pytest.raises(UserError, match=r"\[3, 2\] and \[3, 1\]"):
        statistics.paired(np.zeros((3, 2)), np.zeros((3, 1)))
    one = statistics.paired([1.0, NAN], [0.0, 1.0])
    assert one.difference == 1.0 and np.isnan([one.low, one.high]).all() and one[6:] == (1, 1, 1)
    assert np.isnan(statistics.paired([NAN], [0.0])[:6]).all()


# saturation, contrast, diversity


def flat(*rgb):
    return np.broadcast_to(np.array(rgb, np.float32) * 2 - 1, (4, 6, 3))


def test_saturation_of_gray_is_0_of_pure_colours_1_and_of_a_known_mixture_its_formula():
    images = np.stack(
        [
            flat(0.5, 0.5, 0.5),
            flat(0, 0, 0),
            flat(1, 1, 1),
            flat(1, 0, 0),
            flat(0, 0.2, 0.2),
            flat(0.8, 0.6, 0.4),
        ]
    )
    np.testing.assert_allclose(measures.saturation(images), [0, 0, 0, 1, 1, 0.5], atol=1e-6)
    half = np.concatenate([flat(1, 0, 0), flat(0.5, 0.5, 0.5)])[None]
    assert measures.saturation(half) == pytest.approx(0.5)


def test_saturation_is_the_mean_of_hsv_of_a_public_library():
    import colorsys

    image = np.random.default_rng(22).uniform(-1, 1, (1, 5, 7, 3))
    expected = np.mean([colorsys.rgb_to_hsv(*(pixel + 1) / 2)[1] for pixel in image.reshape(-1, 3)])
    assert measures.saturation(image)[0] == pytest.approx(expected, rel=1e-12)


def test_contrast_of_a_checkerboard_is_a_half_and_of_coloured_halves_follows_rec_709():
    board = np.where((np.indices((4, 6)).sum(0) % 2)[..., None], 1.0, -1.0) * np.ones(3)
    gray = flat(0.3, 0.3, 0.3)
    np.testing.assert_allclose(
        measures.contrast(np.stack([board, 0.5 * board, gray])), [0.5, 0.25, 0.0], atol=1e-7
    )
    halves = np.stack([np.concatenate([flat(*colour), flat(0, 0, 0)]) for colour in np.eye(3)])
    np.testing.assert_allclose(
        measures.contrast(halves), np.array([0.2126, 0.7152, 0.0722]) / 2, rtol=1e-6
    )


def test_images_are_clipped_as_saved_ones_are_and_broken_ones_are_nan():
    images = np.stack([flat(1, 0, 0) * 3.0, flat(1, 0, 0), flat(0.5, 0.5, 0.5)]).astype(np.float32)
    images[1, 0, 0, 0], images[2, 1, 1, 1] = NAN, np.inf
    np.testing.assert_array_equal(measures.saturation(images), [1.0, NAN, NAN])
    np.testing.assert_allclose(measures.contrast(images), [0.0, NAN, NAN], atol=1e-12)


def test_diversity_is_the_mean_pairwise_cosine_distance():
    x = np.random.default_rng(23).standard_normal((8, 5)).astype(np.float32)
    pairs = [
        1 - x[i] @ x[j] / np.linalg.norm(x[i]) / np.linalg.norm(x[j])
        for i in range(8)
        for j in range(i)
    ]
    assert measures.diversity(x) == pytest.approx(np.mean(pairs), rel=1e-6)
    assert measures.diversity(np.ones((3, 4))) == pytest.approx(0.0, abs=1e-12)
    assert measures.diversity(7.0 * np.eye(4)) == pytest.approx(1.0)
    assert measures.diversity([[1.0, 0.0], [-2.0, 0.0]]) == pytest.approx(2.0)


def test_diversity_leaves_broken_samples_out_and_needs_two():
    x = np.eye(3)
    x[1] = NAN
    assert measures.diversity(x) == pytest.approx(1.0)
    assert np.isnan(measures.diversity(x[:2])) and np.isnan(measures.diversity(np.zeros((3, 4))))


def test_the_share_of_attributes_is_1_of_the_right_picture_and_less_of_another():
    rng = np.random.default_rng(24)
    drawn = [scenes.scene_at(index) for index in (5, 70_000)]
    captions = [scene.caption for scene in drawn]
    images = np.stack([np.uint8(255 * scenes.render(scene, rng) + 0.5) for scene in drawn])
    np.testing.assert_array_equal(measures.attributes_right(captions, images), [1.0, 1.0])
    assert measures.attributes_right(captions, images[::-1]).max() < 1.0


def test_best_worst_gains_and_losses_are_the_places_of_their_samples_in_order():
    scores = np.array([[1.0, 5.0], [NAN, 2.0], [9.0, 3.0], [NAN, NAN]])
    differences = np.array([[0.0, 0.5], [NAN, -1.0], [2.0, -3.0], [NAN, NAN]])
    found = picks.extremes(scores, differences)
    assert found["best"] == [(2, 0), (0, 1)] and found["worst"] == [(0, 0), (1, 1)]
    assert found["gains"] == [(2, 0), (0, 1)] and found["losses"] == [(2, 1), (1, 1)]
