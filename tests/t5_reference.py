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

ADJECTIVES = """
    red blue green small large old new bright dark wooden golden quiet stormy tiny giant happy
    sleepy round square soft exquisite next
""".split()
NOUNS = """
    cat dog house river mountain robot castle forest ship lamp table dragon city bridge garden
    window teapot violin planet whale market tower painter street horse bicycle train island flower
    mirror queen box
""".split()
VERBS = """
    sitting running sleeping flying dancing floating standing burning shining waiting reading
""".split()
PLACES = "on in under beside above behind near with inside across".split()
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
CONSONANTS = "b c d f g h j k l m n p q r s t v w x y z ch sh th st tr".split()
VOWELS = "a e i o u ai ea ou er in on al an".split()
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
    a, b = rng.sample(ADJECTIVES, 2)
    n, m = rng.sample(NOUNS, 2)
    s, t = rng.sample(STYLES, 2)
    v, p = rng.choice(VERBS), rng.choice(PLACES)
    return rng.choice(
        [
            f"a {a} {n} {v} {p} the {b} {m}, {s}",
            f"{s} of the {a} {n}s and {rng.randint(0, 3000)} {m}s, {t}.",
            f'an {a}-{b} {n}: "{v}" {p} a {m}! ({t})',
            f"{n}'s {m} {v}ly, {rng.randint(1, 99)}mm f/{rng.randint(1, 22)}.{rng.randint(0, 9)}",
        ]
    )


def _word(rng: random.Random) -> str:
    pairs = (rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(rng.randint(1, 4)))
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


def digest(ids: list[list[int]]) -> str:
    """Of token ids."""
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()


def write_model(folder: Path) -> Path:
    """Unpacks spiece.model into a folder, which it returns."""
    (folder / "spiece.model").write_bytes(lzma.decompress(MODEL.read_bytes()))
    return folder


def main() -> None:
    import sentencepiece
    import transformers

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_corpus()),
        model_writer=model,
        model_type="unigram",
        vocab_size=2000,
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
        theirs = transformers.T5Tokenizer.from_pretrained(write_model(Path(folder)))
    made = {
        "sentencepiece": lambda texts: [[*pieces.encode(text), 1] for text in cleaned(texts)],
        "transformers": lambda texts: theirs(cleaned(texts))["input_ids"],
    }
    rows = {name: ids_of(strings()) for name, ids_of in made.items()}
    of_prompts = {name: digest(ids_of(real_prompts())) for name, ids_of in made.items()}
    IDS.write_text(json.dumps({"strings": rows, "prompts": of_prompts}, separators=(",", ":")))
    for name, (first, second) in {
        "strings": [ids_of(strings()) for ids_of in made.values()],
        "prompts": [ids_of(real_prompts()) for ids_of in made.values()],
    }.items():
        differ = sum(a != b for a, b in zip(first, second))
        print(f"{name}: sentencepiece and transformers differ in {differ} of {len(first)}")


if __name__ == "__main__":
    main()
