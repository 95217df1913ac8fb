# SPDX-License-Identifier: Apache-2.0
"""What a model card says: bases and their licences, scores, hashes, and where it is read back."""

import json

import huggingface_hub
import numpy as np
import pytest
import safetensors.numpy

from di_star_jax import convert, record
from di_star_jax.errors import UserError
from di_star_jax.evaluation import held_out
from di_star_jax.pipelines import card

CALL = card.Call("float16", 1, ())
SDXL = card.Base("stabilityai/sdxl", True, "openrail++")


def source(folder, front_matter):
    """A folder with a model card."""
    folder.mkdir()
    (folder / "README.md").write_text(f"---\n{front_matter}\n---\n# A model\n")
    return str(folder)


def written(tmp_path, *bases, **more):
    """(what the Hub reads of a card, all of it)."""
    about = card.About("ema, step 5", bases, **more)
    text = card.text(about, "mine", CALL, "draw()", {"unet/a.safetensors": "ab12"})
    (tmp_path / "card.md").write_text(text)
    return huggingface_hub.metadata_load(tmp_path / "card.md"), text


# Licences.


def test_the_licence_of_a_base_is_that_of_its_card(tmp_path):
    assert card.base_of(source(tmp_path / "a", "license: mit")) == card.Base("a", False, "mit")
    other = "license: other\nlicense_name: stability-nc\nlicense_link: https://x.y/LICENSE.md"
    found = card.base_of(source(tmp_path / "b", other))
    assert found == card.Base("b", False, "other", "stability-nc", "https://x.y/LICENSE.md")
    assert found.non_commercial


@pytest.mark.parametrize(
    "front_matter", ["tags: [a]", "license: [a, b]", "a: {", "- 1", "license: "]
)
def test_a_card_that_names_no_licence_is_as_none(tmp_path, front_matter):
    assert card.base_of(source(tmp_path / "a", front_matter)) == card.Base("a")


def test_a_network_in_a_pipeline_has_the_pipelines_licence(tmp_path):
    pipeline = source(tmp_path / "pipe", "license: mit")
    (tmp_path / "pipe" / "unet").mkdir()
    assert card.base_of(f"{pipeline}/unet").licence == "", "a folder around it is no pipeline"
    (tmp_path / "pipe" / "model_index.json").write_text("{}")
    assert card.base_of(f"{pipeline}/unet") == card.Base("unet", False, "mit")


def test_of_a_name_on_the_hub_the_card_that_was_fetched_counts(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    kept = tmp_path / "models--me--model"
    for name in ("refs", "snapshots/abc"):
        (kept / name).mkdir(parents=True)
    (kept / "refs" / "main").write_text("abc")
    assert card.base_of("me/model") == card.Base("me/model", True)
    (kept / "snapshots" / "abc" / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    assert card.base_of("me/model") == card.Base("me/model", True, "cc-by-nc-4.0")
    assert card.base_of("gs://bucket/model") == card.Base("model")


def test_a_base_alone_gives_its_licence_and_its_name(tmp_path):
    header, text = written(tmp_path, SDXL)
    assert (header["license"], header["base_model"]) == ("openrail++", "stabilityai/sdxl")
    assert "- [stabilityai/sdxl](https://huggingface.co/stabilityai/sdxl): `openrail++`" in text
    assert "non-commercial" not in text


def test_a_base_that_forbids_commerce_decides(tmp_path):
    generator = card.Base("me/dmd2", True, "cc-by-nc-4.0")
    header, text = written(tmp_path, SDXL, generator)
    assert header["license"] == "cc-by-nc-4.0"
    assert header["base_model"] == ["stabilityai/sdxl", "me/dmd2"]
    assert "**For non-commercial use only**" in text and "generator me/dmd2" in text
    named = card.Base("x", False, "other", "stability-non-commercial", "https://x.y")
    header, text = written(tmp_path, SDXL, named)
    assert header["license_name"] == "stability-non-commercial"
    assert header["license_link"] == "https://x.y" and "use only" in text


@pytest.mark.parametrize(
    "name", ["cc-by-sa-4.0", "apache-2.0", "openrail++", "ncsa", "bsd-3-clause"]
)
def test_a_licence_that_allows_commerce_is_not_said_to_forbid_it(name):
    assert not card.Base("x", False, name).non_commercial


def test_two_licences_are_no_single_one_and_an_unknown_one_is_to_be_looked_up(tmp_path):
    header, _ = written(tmp_path, SDXL, card.Base("x", False, "mit"))
    assert header["license"] == "other"
    header, text = written(tmp_path, SDXL, card.Base("x"))
    assert "license" not in header
    assert "- x: no licence was found beside its weights; look it up" in text


# The rest.


def test_it_says_the_method_the_rewards_the_scores_and_the_hashes(tmp_path):
    _, text = written(
        tmp_path,
        SDXL,
        trained_on={"pickscore": 100.0, "hpsv2": 2.5},
        objective="di_star",
        scores="| a | b |",
        picture=tmp_path / "samples.png",
    )
    for said in (
        "A one-step generator, written by di_star_jax: ema, step 5.",
        "the objective `di_star` of the Diff-Instruct* family",
        "with the rewards pickscore (scale 100), hpsv2 (scale 2.5)",
        "```python\ndraw()\n```",
        "## Scores\n\n| a | b |\n",
        "| unet/a.safetensors | `ab12` |",
        "![samples](samples.png)\n\nBefore and after the training",
    ):
        assert said in text, said
    _, text = written(tmp_path, SDXL, objective="sim")
    assert "without a reward" in text
    assert "## Scores" not in text and "![" not in text and "ComfyUI" not in text


def test_what_a_card_says_is_read_back_from_an_export(tmp_path):
    about = card.About("ema, step 5", (SDXL,), {"pickscore": 100.0}, "di_star", "| a |")
    (tmp_path / card.FACTS).write_text(json.dumps(about.facts()))
    assert card.About.of_export(tmp_path) == about
    (tmp_path / card.PICTURE).touch()
    assert card.About.of_export(tmp_path).picture == tmp_path / card.PICTURE


@pytest.mark.parametrize("kept", [{}, {"bases": 3}, {"bases": [{"x": 1}]}, {"bases": [], "y": 1}])
def test_another_pipeline_is_its_own_base(tmp_path, kept):
    folder = tmp_path / "sdxl"
    source(folder, "license: openrail++")
    (folder / card.FACTS).write_text(json.dumps(kept))
    assert card.About.of_export(folder).bases == (card.Base("sdxl", False, "openrail++"),)


# What was trained, and what was not.


MINE = card.Base("mine.safetensors", sha256="ab12")


def test_a_plain_conversion_names_its_file_and_claims_no_training(tmp_path):
    about = card.About("", (MINE,))
    said = card.text(about, "mine", card.Call("float16", 0, ()), "draw()", {"unet/a": "cd34"})
    assert "A diffusion model, converted by di_star_jax. These are the weights of mine." in said
    assert "nothing was trained here" in said and "- mine.safetensors (SHA-256 `ab12`): no" in said
    assert "Diff-Instruct" not in said and "written by" not in said and "made from" not in said
    _, text = written(tmp_path, MINE)
    assert "written by di_star_jax: ema, step 5. It was made from mine.safetensors." in text


def test_a_whole_network_in_which_adapters_have_learnt_says_so(tmp_path):
    low_rank = {"rank": 64, "alpha": 32.0, "generator": True, "assistant": False}
    metadata = {"reference": "me/sdxl", "initial": "me/dmd2", "lora": low_rank}
    about = card.About.of_run(metadata, "ema, step 5")
    assert about.lora == "rank 64, alpha 32"
    said = card.text(about, "mine", CALL, "draw()", {})
    assert "a whole network: the adapters that have learnt (rank 64, alpha 32) are merged" in said
    for which, of in (("assistant, step 5", low_rank), ("ema, step 5", None)):
        about = card.About.of_run(metadata | {"lora": of}, which)
        assert about.lora == "" and "adapters" not in card.text(about, "mine", CALL, "draw()", {})


def test_a_file_of_adapters_says_that_it_is_no_whole_network_and_on_what_it_goes():
    about = card.About("ema, step 5", (SDXL, card.Base("dmd2")), objective="sim", lora="rank 4")
    said = card.text_of_adapters(about, "a.safetensors", "dmd2", "load it", "float16", "ab12")
    assert "# a\n\nLoRA adapters (rank 4), written by di_star_jax: ema, step 5. They were" in said
    assert "**These are adapters alone, no whole network**: they go on dmd2." in said
    assert "## Use\n\nload it\n" in said and "| a.safetensors | `ab12` |" in said
    made = card.About("", (SDXL, MINE), lora="rank 4")
    said = card.text_of_adapters(made, "a.safetensors", "x", "load it", "float16", "ab12")
    assert "low-rank part of what mine.safetensors has learnt from the weights of stab" in said
    assert "nothing was trained here" in said


def test_the_licence_of_a_file_is_that_of_its_own_card_or_of_its_header(tmp_path):
    file = tmp_path / "a.safetensors"

    def licence(text):
        more = {"modelspec.license": text} if text else {}
        safetensors.numpy.save_file({"x": np.zeros(1)}, file, metadata=more)
        return card.base_of_file(file, "a.safetensors", "ab12")

    assert licence("") == card.Base("a.safetensors", sha256="ab12")
    found = licence("CreativeML Open RAIL++-M License")
    assert (found.licence, found.more) == ("other", "creativeml-open-rail++-m-license")
    assert licence("CC BY-NC 4.0").non_commercial
    (tmp_path / "a.md").write_text("---\nlicense: mit\n---\n")
    assert licence("x") == card.Base("a.safetensors", licence="mit", sha256="ab12")


def test_a_converted_folder_stands_for_its_file_and_an_aligned_one_for_itself(tmp_path):
    (tmp_path / card.FACTS).write_text(json.dumps(card.About("", (MINE,)).facts()))
    assert card.bases_of(str(tmp_path)) == (MINE,)
    metadata = {"reference": str(tmp_path), "initial": str(tmp_path)}
    assert card.About.of_run(metadata, "ema").bases == (MINE,)
    (tmp_path / card.FACTS).write_text(json.dumps(card.About("ema", (MINE,)).facts()))
    assert card.bases_of(str(tmp_path)) == (card.Base(tmp_path.name),)


# What a run has found.


@pytest.fixture
def finished(tmp_path):
    """A run's workdir, but for its networks."""
    (tmp_path / record.FILE).write_text(json.dumps({"config": {}, "finished": {"step": 30}}))
    (tmp_path / card.PICTURE).touch()
    before = {"pickscore": 0.5, "pickscore, std": 0.1}
    scores = {"before": before, "after": {"pickscore": 0.7, "pickscore, std": 0.1}}
    (tmp_path / held_out.AFTER).write_text(json.dumps(scores))
    return tmp_path


def test_the_network_at_the_end_has_the_runs_picture_and_scores(finished):
    for folder in (finished, finished / "checkpoints"):
        picture, scores = convert._found(folder, "ema", 30)
        assert picture == finished / card.PICTURE
        assert "| pickscore | 0.5000 | 0.7000 | +0.2000 |" in scores
        assert "Pickscore rose by +2.00 standard deviations" in scores
        assert str(finished) not in scores, "paths are no one's business"


@pytest.mark.parametrize("which, step", [("generator", 30), ("assistant", 30), ("ema", 20)])
def test_another_network_has_none(finished, which, step):
    assert convert._found(finished, which, step) == (None, "")


def test_a_run_without_held_out_prompts_has_none(tmp_path):
    (tmp_path / record.FILE).write_text(json.dumps({"config": {}, "finished": {"step": 30}}))
    assert convert._found(tmp_path, "ema", 30) == (None, "")
    assert convert._found(tmp_path / "elsewhere", "ema", 30) == (None, "")
    (tmp_path / record.FILE).write_text("{damaged")
    assert convert._found(tmp_path, "ema", 30) == (None, "")


def test_the_table_of_an_evaluation_is_the_flags(tmp_path):
    assert convert._scores(None) == ""
    with pytest.raises(UserError, match="evaluation that has come to its end"):
        convert._scores(str(tmp_path))
    (tmp_path / "results.json").write_text("{}")
    (tmp_path / "table.md").write_text("| generator |\n")
    assert convert._scores(str(tmp_path)) == "| generator |"
