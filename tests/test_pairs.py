# SPDX-License-Identifier: Apache-2.0
"""Preference pairs from tables, parquet files and buckets: read, checked, split, decoded."""

import contextlib
import io
import json
import os
import subprocess
import sys
import time

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from di_star_jax.errors import UserError
from di_star_jax.preference import decode, source, stream
from di_star_jax.preference.records import BROKEN, EQUAL, UNKNOWN, UNLABELLED
from di_star_jax.rewards import collection
from di_star_jax.rewards.pixels import CLIP_MEAN, CLIP_STD
from di_star_jax.shapes import pairs, scenes, taste
from di_star_jax.storage.files import digest_of

SIZE = 16
COLORS = [(20 * i, 255 - 20 * i, 30) for i in range(12)]


def image_file(color=(200, 30, 30), size=(20, 16), kind="PNG"):
    file = io.BytesIO()
    pixels = np.full((*size[::-1], 3), color, np.uint8)
    pixels[::3, ::2] //= 2
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def table(folder, rows, name="pairs.csv"):
    """Args: rows of (caption, image, image, label), images as bytes or the names of files."""
    folder.mkdir(parents=True, exist_ok=True)
    cells = []
    for i, (caption, *images, label) in enumerate(rows):
        for side, image in enumerate(images):
            if isinstance(image, bytes):
                images[side] = f"{i}_{side}.png"
                (folder / images[side]).write_bytes(image)
        cells.append((caption, *images, label))
    columns = ("caption", "image_0", "image_1", "label")
    if name.endswith(".jsonl"):
        lines = [json.dumps(dict(zip(columns, row))) for row in cells]
    else:
        mark = {"c": ",", "t": "\t"}[name[-3]]
        lines = [mark.join(map(str, row)) for row in (columns, *cells)]
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def some_rows(count=12, prompts=6):
    labels = ["0", "1", "tie"]
    return [
        (f"prompt {i % prompts}", image_file(COLORS[i % 12]), image_file((9, i, 9)), labels[i % 3])
        for i in range(count)
    ]


def parquet(path, rows, **changes):
    """Args: rows of (caption, image, image, label_0, label_1, has_label); changes, of columns."""
    caption, jpg_0, jpg_1, label_0, label_1, has_label = map(list, zip(*rows))
    columns = {
        "are_different": [True] * len(rows),
        "caption": caption,
        "has_label": has_label,
        "image_0_url": ["http://nowhere"] * len(rows),
        "jpg_0": jpg_0,
        "jpg_1": jpg_1,
        "label_0": label_0,
        "label_1": label_1,
        "num_example_per_prompt": list(range(1, len(rows) + 1)),
    } | changes
    columns = {name: values for name, values in columns.items() if values is not None}
    path.parent.mkdir(exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def load(name, folder):
    return source.load(str(name), folder, 1, "data.pairs")


def test_what_cannot_be_used_is_counted_and_listed_with_its_row(tmp_path):
    good, other = image_file(), image_file((0, 0, 9))
    rows = [
        ("a", good, other, "0"),
        ("b", good, other[:-30], "1"),  # cut short
        ("c", good, good, "0"),
        ("d", good, other, "left"),
        ("e", b"no image", other, "1"),
        ("f", other, good, "tie"),
    ]
    found = load(table(tmp_path / "pairs", rows), tmp_path / "records")
    assert found.counts == {"usable": 2, UNLABELLED: 0, BROKEN: 2, EQUAL: 1, UNKNOWN: 1}
    assert [(fault.row, fault.kind) for _, fault in found.faults] == [
        (1, BROKEN),
        (2, EQUAL),
        (3, UNKNOWN),
        (4, BROKEN),
    ]
    assert all(name.endswith("pairs.csv") for name, _ in found.faults)
    first, last = found.take(np.arange(2))
    assert first == ("a", (good, other), 1.0, 1) and last == ("f", (other, good), 0.5, 1)


@pytest.mark.parametrize("name", ["pairs.csv", "pairs.tsv", "pairs.jsonl"])
def test_every_kind_of_table_and_of_image_gives_the_same_pairs(tmp_path, name):
    kinds = [image_file(kind=kind) for kind in ("PNG", "JPEG", "WebP")]
    rows = [("a", kinds[0], kinds[1], 0), ("b", kinds[1], kinds[2], 1), ("a", *kinds[1:], "tie")]
    found = load(table(tmp_path / "pairs", rows, name), tmp_path / "records")
    pairs = list(found.take(np.arange(len(found))))
    assert [pair.label_0 for pair in pairs] == [1.0, 0.0, 0.5]
    assert [pair.num_examples for pair in pairs] == [2, 1, 2]  # counted
    assert [pair.images for pair in pairs] == [tuple(row[1:3]) for row in rows]


def test_pick_a_pics_parquet_is_read_and_rows_without_a_label_are_left_out(tmp_path):
    good, other = image_file(kind="JPEG"), image_file((0, 0, 9), kind="JPEG")
    rows = [
        ("a", good, other, 1.0, 0.0, True),
        ("b", good, other, 0.0, 1.0, False),
        ("c", good, other, 0.5, 0.5, True),
        ("d", good, other, 0.3, 0.3, True),
        ("e", other, good, 0.0, 1.0, True),
    ]
    parquet(tmp_path / "data" / "train-00000-of-00002-ab.parquet", rows[:3])
    parquet(tmp_path / "data" / "train-00001-of-00002-cd.parquet", rows[3:])
    found = load(tmp_path / "data", tmp_path / "records")
    assert found.counts == {"usable": 3, UNLABELLED: 1, BROKEN: 0, EQUAL: 0, UNKNOWN: 1}
    pairs = list(found.take(np.arange(3)))
    assert [(p.caption, p.label_0, p.num_examples) for p in pairs] == [
        ("a", 1.0, 1),
        ("c", 0.5, 3),
        ("e", 0.0, 2),
    ]
    assert pairs[2].images == (other, good)
    # Where validation lies beside it, a pattern says which.
    parquet(tmp_path / "data" / "validation-00000-of-00001-ef.parquet", rows[:1])
    with pytest.raises(UserError, match="holds the splits train, validation, expected one; give"):
        load(tmp_path / "data", tmp_path / "records")
    of_train = load(tmp_path / "data" / "train-*.parquet", tmp_path / "records")
    assert of_train.digest == found.digest


def test_pairs_of_a_bucket_are_those_of_a_folder(bucket, tmp_path):
    from di_star_jax.storage import buckets

    rows = [(str(i), image_file(), image_file((0, 0, i)), 1.0, 0.0, True) for i in range(2)]
    here = load(parquet(tmp_path / "train-0-of-1.parquet", rows), tmp_path / "records")
    buckets.put(tmp_path / "train-0-of-1.parquet", f"{bucket.url}/pairs/p/train-0-of-1.parquet")
    there = load(f"{bucket.url}/pairs/p/train-*.parquet", tmp_path / "records")
    assert there.digest == here.digest and len(there) == 2
    folder = table(tmp_path / "pairs", some_rows(3))
    buckets.upload(folder, f"{bucket.url}/pairs/table")
    assert load(f"{bucket.url}/pairs/table", tmp_path / "records").digest == (
        load(folder, tmp_path / "records").digest
    )


def test_files_that_are_read_are_not_read_again_and_what_a_stop_left_is(tmp_path, monkeypatch):
    rows = [(str(i), image_file(), image_file((0, 0, i)), 1.0, 0.0, True) for i in range(3)]
    for i in range(3):
        parquet(tmp_path / "data" / f"{i}.parquet", rows[i:])
    made, plain = [], source._make_here

    def noting(name, *rest):
        made.append(os.path.basename(name))
        if len(made) == 3:
            raise KeyboardInterrupt
        return plain(name, *rest)

    monkeypatch.setattr(source, "_make_here", noting)
    with pytest.raises(KeyboardInterrupt):
        load(tmp_path / "data", tmp_path / "records")
    assert len(load(tmp_path / "data", tmp_path / "records")) == 6
    assert made == ["0.parquet", "1.parquet", "2.parquet", "2.parquet"]
    pieces = [path.parent for path in (tmp_path / "records").glob("*/*/*/*.array_record*")]
    next((pieces[0]).glob("*.array_record*")).write_bytes(b"cut")
    assert len(load(tmp_path / "data", tmp_path / "records")) == 6 and len(made) == 5


def test_a_prompt_is_either_trained_on_or_held_out(tmp_path):
    found = load(table(tmp_path / "pairs", some_rows(36, prompts=12)), tmp_path / "records")
    train, held_out = source.by_prompt(found, 0.5, seed=1)
    assert sorted([*train, *held_out]) == list(range(36)) and len(train) and len(held_out)
    captions = [{p.caption for p in found.take(chosen)} for chosen in (train, held_out)]
    assert not captions[0] & captions[1]
    again = source.by_prompt(found, 0.5, seed=1)
    assert np.array_equal(train, again[0]) and np.array_equal(held_out, again[1])
    assert not np.array_equal(train, source.by_prompt(found, 0.5, seed=2)[0])
    more = source.by_prompt(found, 0.7, seed=1)  # who is held out stays so
    assert set(held_out) < set(more[1])


@pytest.mark.parametrize(
    "made, message",
    [
        (lambda f: f, "no such file or folder; give a folder with pairs.csv"),
        (lambda f: table(f, []).joinpath("x"), "no such file or folder"),
        (lambda f: table(f, [], "other.csv"), "no pairs there; give a folder with pairs.csv or"),
        (
            lambda f: table(f, [("a", "gone.png", image_file(), "0")]),
            r"1 of its 2 image files are missing, the first is .*gone.png; paths count from",
        ),
        (
            lambda f: table(f, []).joinpath("pairs.csv").write_text("prompt,label\na,0\n") and f,
            "pairs.csv has the columns prompt, label, expected caption, image_0, image_1, label",
        ),
        (
            lambda f: parquet(f / "a.parquet", [("a", b"", b"", 1.0, 0.0, True)], jpg_0=None),
            "has no column jpg_0, it has are_different, .*not pickapic_v1_no_images",
        ),
        (
            lambda f: parquet(f / "a.parquet", [("a", None, b"x", 1.0, 0.0, True)]),
            "row 0 has no picture in jpg_0 or jpg_1; expected the bytes",
        ),
    ],
)
def test_a_source_that_cannot_be_read_is_refused_in_one_line(tmp_path, made, message):
    with pytest.raises(UserError, match=message) as error:
        load(made(tmp_path / "pairs"), tmp_path / "records")
    assert "\n" not in str(error.value)


# Pixels.


@pytest.mark.parametrize("size", [(32, 32), (47, 33), (39, 32), (14, 10), (96, 64)])
@pytest.mark.parametrize("kind, mode", [("PNG", "RGB"), ("JPEG", "RGB"), ("PNG", "RGBA")])
def test_pixels_are_those_of_transformers_processor(size, kind, mode):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(
        size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}
    )
    levels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 4), np.uint8)
    file = io.BytesIO()
    Image.fromarray(levels).convert(mode).save(file, kind)
    seen = np.asarray(Image.open(file).convert("RGB"))
    (normal,) = processor([Image.fromarray(seen)], return_tensors="np").pixel_values
    expected = (normal.transpose(1, 2, 0) * CLIP_STD + CLIP_MEAN) * 255
    ours = decode.pixels(file.getvalue(), SIZE, "clip")
    assert ours.dtype == np.uint8 and np.abs(ours - expected).max() < 1e-3


def test_torchvisions_crop_begins_at_another_pixel():
    content = image_file(size=(39, 32))  # resized to 19 x 16: an excess of 3, of 2 and of 1
    wide = decode.pixels(content, SIZE, "torchvision"), decode.pixels(content, SIZE, "clip")
    assert not np.array_equal(*wide)


@pytest.mark.parametrize("processes", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_step_sees_the_same_pairs_whoever_decodes_them_and_wherever_it_began(tmp_path, processes):
    found = load(table(tmp_path / "pairs", some_rows(12)), tmp_path / "records")
    examples = found.take(np.arange(len(found)))
    whole = stream.Batches(examples, 3, 4, tuple(range(4)), SIZE, "clip")
    second_host = stream.Batches(examples, 3, 4, (2, 3), SIZE, "clip")
    with contextlib.ExitStack() as stack:
        straight = list(stack.enter_context(stream.batches(whole, 0, 6, processes)))
        later = list(stack.enter_context(stream.batches(second_host, 2, 6, processes)))
    assert len(straight) == 6
    seen = [caption for batch in straight[:3] for caption in json.loads(batch["captions"])]
    assert sorted(seen) == sorted(pair.caption for pair in examples)  # an epoch has each once
    for k, batch in enumerate(later, 2):
        assert np.array_equal(batch["pixels"], straight[k]["pixels"][2:])
        assert json.loads(batch["captions"]) == json.loads(straight[k]["captions"])[2:]
        assert np.array_equal(batch["label_0"], straight[k]["label_0"][2:])


HANGS = """
import sys, time
from di_star_jax.preference import stream
class Slow:
    def __call__(self, k):
        print("decodes", flush=True)
        time.sleep(0.2)
        return {"k": k}
if __name__ == "__main__":
    with stream.batches(Slow(), 0, 10**6, 1) as made:
        next(made)
        import os
        os._exit(0)  # as a run that leaves at once
"""


@pytest.mark.slow
def test_workers_end_with_a_run_that_ends_at_once(tmp_path):
    (tmp_path / "hangs.py").write_text(HANGS)
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, tmp_path / "hangs.py"],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )  # waits until nobody holds its output
    assert done.returncode == 0 and "decodes" in done.stdout, done.stderr
    assert time.monotonic() - began < 100 and "Traceback" not in done.stderr


def test_drawn_pictures_are_judged_by_what_they_show_and_then_by_the_taste(tmp_path):
    rng = np.random.default_rng(0)
    scene = scenes.sample_scene(rng, held_out=False)
    other = scenes.sample_scene(rng, held_out=False)
    drawn = [np.round(255 * scenes.render(s, rng)).astype(np.uint8) for s in [scene] * 8 + [other]]
    liked = [taste.taste(image / 255) for image in drawn]
    best, worst = int(np.argmax(liked[:8])), int(np.argmin(liked[:8]))
    assert liked[best] - liked[worst] > 2
    shown = {"0.png": best, "1.png": worst}
    third = next(i for i in range(8) if i not in (best, worst))
    wrong = {"2.png": third, "3.png": 8}  # the last one shows another scene
    (tmp_path / "drawn").mkdir()
    for name, i in (shown | wrong).items():
        Image.fromarray(drawn[i]).save(tmp_path / "drawn" / name)
    listing = {name: scene.caption for name in (*shown, *wrong)}
    (tmp_path / "drawn" / "prompts.json").write_text(json.dumps(listing))
    pairs.judge(str(tmp_path / "drawn"), tmp_path / "out", seed=0)
    rows = collection.read_table(tmp_path / "out" / "pairs.csv")
    assert len(rows) == 2
    digests = {f"images/{digest_of(tmp_path / 'drawn' / n)[:16]}.png": n for n in listing}
    for pair, label in rows:
        names = [digests[pair.image_0], digests[pair.image_1]]
        assert names[int(label)] == ("0.png" if "0.png" in names else "2.png")
        assert all((tmp_path / "out" / name).is_file() for name in (pair.image_0, pair.image_1))
    found = load(tmp_path / "out", tmp_path / "records")
    assert len(found) == 2
