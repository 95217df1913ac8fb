# SPDX-License-Identifier: Apache-2.0
"""A small SentencePiece model of T5's kind, and the token ids that sentencepiece and transformers
make with it: t5_reference/.

`python tests/t5_reference.py` makes them anew, where sentencepiece, protobuf and transformers are
installed; the tests need none of the first two. All text comes from here but the real prompts,
of which a digest of their ids is kept.
"""

import hashlib
import io
import json
import lzma
import random
import tempfile
from pathlib import Path

FOLDER = Path(__file__).with_suffix("")
MODEL, IDS = FOLDER / "spiece.model.xz", FOLDER / "ids.json"
PROMPTS = Path(__file__).parents[2] / "shared" / "prompts"

_WORDS = {
    "adjectives": """
        red blue green small large old new bright dark wooden golden quiet stormy tiny giant happy
        sleepy round square soft exquisite next
    """,
    "nouns": """
        cat dog house river mountain robot castle forest ship lamp table dragon city bridge garden
        window teapot violin planet whale market tower painter street horse bicycle train island
        flower mirror queen box
    """,
    "verbs": "sitting running sleeping flying dancing floating standing burning shining waiting",
    "places": "on in under beside above behind near with inside across",
    "consonants": "b c d f g h j k l m n p q r s t v w x y z ch sh th st tr",
    "vowels": "a e i o u ai ea ou er in on al an",
}
WORDS = {kind: words.split() for kind, words in _WORDS.items()}
STYLES = [
    "oil painting",
    "watercolor",
    "photograph",
    "digital art",
    "pencil sketch",
    "4k",
    "highly detailed",
    "cinematic light",
    "portrait of",
    "35mm",
    "by an unknown artist",
]
SIZE = 2000  # pieces
ALPHABETS = [
    "éèêäöüßñçàâîôûøåæœłśžč",
    "абвгдежзиклмнопрстуфхцчшыьюя",
    "αβγδεζηθικλμνοπρστυφω",
]
SIGNS = "!?.,;:'\"()[]{}/\\|@#$%^&*-_=+~`€£©®™°"
# What Unicode has that a tokenizer may trip over.
ODD = [
    *"😀🚀❤️🔥🌊🎨🧙🏽",
    "👨‍👩‍👧‍👦",
    "🇩🇪🇯🇵",
    "1️⃣",
    "✈️",
    "ﬁne ﬂow",
    "①②③",
    "½ cup",
    "ｆｕｌｌ ｗｉｄｔｈ",
    "ｶﾞｷﾞ",
    "日本の山",
    "山水画",
    "한국어",
    "각",
    "العربية",
    "हिन्दी",
    "ไทย",
    "עברית",
    "naïve café",
    "nai\u0308ve cafe\u0301",
    "İstanbul",
    "ΑΣ ΟΔΟΣ",
    "STRASSE ẞ",
    "ǅ ǆ",
    "zero\u200bwidth",
    "join\u200der",
    "soft\u00adhyphen",
    "no\u00a0break",
    "em\u2003space",
    "line\u2028break",
    "tab\there",
    "new\nline",
    "carriage\r\nreturn",
    "bell\x07",
    "\ufeffmark",
    "\u3000ideographic\u3000",
    "\u202eright to left",
    "x² + y³ = z₁",
    "№ 5 ™ ℃",
    "“quotes” ‘single’ — dash – … ‹›",
    "a\u0301\u0302\u0303\u0304",
    "▁underscore ▁▁",
    "𝒇𝒂𝒏𝒄𝒚 𝕿𝖊𝖝𝖙",
    "💩" * 7,
    "\u0000null",
    "\ue000private",
    "\U0010ffff",
]


def _sentence(rng: random.Random) -> str:
    a, b = rng.sample(WORDS["adjectives"], 2)
    n, m = rng.sample(WORDS["nouns"], 2)
    s, t = rng.sample(STYLES, 2)
    v, p = rng.choice(WORDS["verbs"]), rng.choice(WORDS["places"])
    return rng.choice(
        [
            f"a {a} {n} {v} {p} the {b} {m}, {s}",
            f"{s} of the {a} {n}s and {rng.randint(0, 3000)} {m}s, {t}.",
            f'an {a}-{b} {n}: "{v}" {p} a {m}! ({t})',
            f"{n}'s {m} {v}ly, {rng.randint(1, 99)}mm f/{rng.randint(1, 22)}.{rng.randint(0, 9)}",
        ]
    )


def _word(rng: random.Random) -> str:
    pairs = (
        rng.choice(WORDS["consonants"]) + rng.choice(WORDS["vowels"])
        for _ in range(rng.randint(1, 4))
    )
    return "".join(pairs)


def _letters(rng: random.Random) -> str:
    return "".join(rng.choices(rng.choice(ALPHABETS), k=rng.randint(1, 6)))


def _corpus() -> list[str]:
    rng = random.Random(0)
    lines = [_sentence(rng) for _ in range(6000)]
    lines += [" ".join(_word(rng) for _ in range(8)) for _ in range(4000)]
    lines += [" ".join(_letters(rng) for _ in range(6)) for _ in range(600)]
    return lines + ["".join(rng.choices(SIGNS, k=10)) for _ in range(300)]


def strings() -> list[str]:
    """500 of them: Unicode, emoji, digits, blanks, signs."""
    rng = random.Random(1)
    kinds = [
        lambda: rng.choice(ODD),
        lambda: " " * rng.randint(1, 4) + rng.choice("\t\n ") + _word(rng).title(),
        lambda: str(rng.randint(0, 10 ** rng.randint(1, 12))),
        lambda: "".join(rng.choices(SIGNS, k=rng.randint(1, 5))),
        lambda: _letters(rng).upper(),
        lambda: chr(rng.choice([*range(0x20, 0x3000), *range(0x1F300, 0x1F6FF)])),
        lambda: _sentence(rng),
    ]
    mixed = [
        rng.choice(["", " ", "  "]).join(rng.choice(kinds)() for _ in range(rng.randint(1, 6)))
        for _ in range(500 - len(ODD) - 3)
    ]
    return ["", " ", "\n\t ", *ODD, *mixed]


def real_prompts() -> list[str]:
    """2,000 of the lists beside the checkout."""
    table = (PROMPTS / "parti_prompts.tsv").read_text(encoding="utf-8").splitlines()[1:]
    lists = [
        (PROMPTS / "coco2014_val_30k.txt").read_text(encoding="utf-8").splitlines(),
        (PROMPTS / "diffusiondb_refl_filtered.txt").read_text(encoding="utf-8").splitlines(),
        [line.split("\t")[0] for line in table],
    ]
    return [text for texts, count in zip(lists, (500, 1000, 500)) for text in texts[:count]]


def cleaned(texts: list[str]) -> list[str]:
    """As diffusers' PixArt pipeline without clean_caption."""
    return [text.lower().strip() for text in texts]


def rows(ids: list[list[int]]) -> list[list[int]]:
    """Cut to 120 tokens, the last of which is the end, and padded to as many."""
    cut = [row if len(row) <= 120 else [*row[:119], 1] for row in ids]
    return [row + [0] * (120 - len(row)) for row in cut]


def digest(ids: list[list[int]]) -> str:
    """Of the token ids of many prompts."""
    return hashlib.sha256(json.dumps(rows(ids)).encode()).hexdigest()


def write_folder(folder: Path) -> Path:
    """A tokenizer's folder with the files that PixArt's has, which it returns."""
    folder.mkdir()
    (folder / "spiece.model").write_bytes(lzma.decompress(MODEL.read_bytes()))
    sentinels = {f"<extra_id_{i}>": SIZE + 99 - i for i in range(100)}
    specials = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    files = {
        "added_tokens.json": sentinels,
        "special_tokens_map.json": {"additional_special_tokens": [*sentinels], **specials},
        "tokenizer_config.json": {
            "added_tokens_decoder": {
                str(number): {
                    "content": text,
                    "lstrip": False,
                    "normalized": False,
                    "rstrip": False,
                    "single_word": False,
                    "special": True,
                }
                for text, number in {"<pad>": 0, "</s>": 1, "<unk>": 2, **sentinels}.items()
            },
            "additional_special_tokens": [*sentinels],
            "clean_up_tokenization_spaces": True,
            "extra_ids": 100,
            "legacy": True,
            "model_max_length": 512,
            "sp_model_kwargs": {},
            "tokenizer_class": "T5Tokenizer",
            **specials,
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2))
    return folder


def main() -> None:
    import sentencepiece
    import transformers

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_corpus()),
        model_writer=model,
        model_type="unigram",
        vocab_size=SIZE,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        normalization_rule_name="nmt_nfkc",
        character_coverage=1.0,
        num_threads=1,
        minloglevel=2,
    )
    FOLDER.mkdir(exist_ok=True)
    MODEL.write_bytes(lzma.compress(model.getvalue(), preset=9))
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    with tempfile.TemporaryDirectory() as folder:
        theirs = transformers.T5Tokenizer.from_pretrained(write_folder(Path(folder) / "tokenizer"))
    made = {
        "sentencepiece": lambda texts: [[*pieces.encode(text), 1] for text in cleaned(texts)],
        "transformers": lambda texts: theirs(cleaned(texts))["input_ids"],
    }
    content = {
        "strings": {name: ids_of(strings()) for name, ids_of in made.items()},
        "prompts": {name: digest(ids_of(real_prompts())) for name, ids_of in made.items()},
    }
    IDS.write_text(json.dumps(content, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
