"""Make the tokenizers' goldens: a small sentencepiece model, a vocabulary and what they give.

Run with transformers 4.57.1, whose slow tokenizers are the reference:

    python tests/golden/make_tokenizer_goldens.py

Writes `tokenizer/sentencepiece.bpe.model`, `tokenizer/vocab.json` and `tokenizer/goldens.json`
beside this file. Same versions, same bytes.
"""

import contextlib
import io
import json
import platform
import random
import tempfile
import unicodedata
from pathlib import Path

import sentencepiece
import transformers
from transformers import AddedToken
from transformers.models.m2m_100.tokenization_m2m_100 import FAIRSEQ_LANGUAGE_CODES, M2M100Tokenizer
from transformers.models.nllb.tokenization_nllb import FAIRSEQ_LANGUAGE_CODES as NLLB_CODES
from transformers.models.nllb.tokenization_nllb import NllbTokenizer

FOLDER = Path(__file__).parent / "tokenizer"
MODEL_FILE = FOLDER / "sentencepiece.bpe.model"
VOCABULARY_FILE = FOLDER / "vocab.json"
PIECES = 560

CORPUS = """
The old mill by the river still grinds the village's corn every autumn.
How was your day? Mine was long, but the evening train was on time.
She bought three apples, two loaves of bread and 1,250 grams of cheese for 7.95 euros.
"Is this the right bus?" he asked; nobody knew, and it didn't matter.
Le vieux moulin au bord de la rivière moud encore le blé du village chaque automne.
Comment s'est passée ta journée ? La mienne a été longue, mais le train était à l'heure.
Die alte Mühle am Fluss mahlt noch jeden Herbst das Korn des Dorfes.
Wie war dein Tag? Meiner war lang, aber der Abendzug kam pünktlich.
El viejo molino junto al río todavía muele el maíz del pueblo cada otoño.
Elle a acheté trois pommes et deux pains; el niño comió una manzana pequeña.
Moara veche de lângă râu macină și astăzi grâul satului în fiecare toamnă.
Kinu cha zamani kando ya mto bado husaga mahindi ya kijiji kila mwaka.
Eski değirmen hâlâ köyün buğdayını öğütüyor.
Ngôi nhà cũ bên bờ sông vẫn còn đó.
Старая мельница у реки всё ещё мелет зерно деревни каждую осень.
Как прошёл твой день? Мой был долгим, но поезд пришёл вовремя.
Ο παλιός μύλος δίπλα στο ποτάμι αλέθει ακόμα το σιτάρι του χωριού.
नदी के किनारे की पुरानी चक्की आज भी गाँव का अनाज पीसती है।
आपका दिन कैसा रहा?
الطاحونة القديمة بجانب النهر ما زالت تطحن قمح القرية كل خريف.
كيف كان يومك؟
הטחנה הישנה ליד הנהר עדיין טוחנת את החיטה של הכפר.
河边的老磨坊每年秋天仍在磨村里的玉米。你今天过得怎么样？
川のそばの古い水車は今も村の麦をひいている。
강가의 오래된 물레방아는 지금도 마을의 밀을 빻는다.
โรงสีเก่าริมแม่น้ำยังคงทำงานอยู่
ძველი წისქვილი მდინარესთან დგას.
""".strip().splitlines()

TEXTS = [
    "",
    " ",
    "   \t \n ",
    "\u00a0",
    "\u3000\u2003",
    "a",
    "How was your day?",
    " UN Chief Says There Is No Military Solution in Syria",
    "trailing space ",
    "two  spaces   and    more",
    "tab\tseparated\tvalues",
    "line one\nline two\r\nline three",
    "no\u00a0break\u202fspaces\u2009here",
    "ideographic\u3000space",
    "zero\u200bwidth\u200bspace",
    "क\u094d\u200dष joined and क\u094d\u200cष not joined",
    "soft\u00adhyphen and \u2060word joiner\ufeff",
    "Die alte Mühle",
    "Die alte Mu\u0308hle with a combining mark",
    "e\u0301 e\u0302\u0323 \u0301alone",
    "ＦＵＬＬ　ＷＩＤＴＨ１２３！",
    "ﬁne oﬀer, ﬃ ligatures, ½ and ² and ™",
    "ｶﾞｷﾞ half width",
    "عربي ثم English ثم عربي",
    "\u202eright to left override\u202c",
    "הטחנה \u200fהישנה",
    "नदी के किनारे",
    "河边的老磨坊每年秋天仍在磨村里的玉米。",
    "強調《罕見》龘字",
    "川のそばの古い水車",
    "강가의 오래된 물레방아",
    "โรงสีเก่าริมแม่น้ำ",
    "emoji 🙂 and 👩‍👩‍👧‍👦 and 🇫🇷 and ❤️",
    "🙂🙂🙂",
    "𝕸𝖆𝖙𝖍 𝒍𝒆𝒕𝒕𝒆𝒓𝒔 and 𐍈 gothic",
    "control \x01\x02\x07\x1b[31m characters\x7f",
    "nul \x00 inside\x00",
    "\x00",
    "\x85next line \u2028 separator \u2029",
    "replacement \ufffd character \uffff",
    "private \ue000 use \U0010fffd",
    "▁underline▁block ▁ alone",
    "</s>",
    "the end</s> is not </s>the end",
    " </s> ",
    "<s>hello</s>",
    "<pad><pad> padded",
    "an <unk> word",
    "<unk>",
    "fill the <mask> in",
    "fill the   <mask>   in",
    "<mask>",
    " <mask><mask> <mask>",
    "</s> <mask>",
    "a next line\x85<mask>\x85 is white space to Python only",
    "eng_Latn",
    "speak fra_Latn now",
    "xeng_Latnx and eng_Latneng_Latn",
    "ace_Latnus_Latn zho_Hans zho_Hanst",
    "ENG_LATN eng_latn eng-Latn",
    "__en__",
    "speak __fr__ now __fr",
    "___en____fr___",
    "__en____fr__ hello __zz__",
    "<s<s></s</s>>",
    "<</s>>",
    "＜/s＞ ＜s＞",
    "<s>\u0301 </s>\u200d",
    "\n</s>\n",
    "x" * 300,
    "ab" * 200 + "é",
    "http://example.org/a?b=c&d=%20#e",
    "!?!?... -- “quotes” ‘single’ «guillemets»",
    "don't can't we've I'm he's they're ' s",
    "a , b . c ! d ? e",
    "1,234,567.89 − 50 % = 7½",
    "<b>html</b> &amp; &lt;entities&gt;",
    "C:\\path\\file.txt",
    "mixed Русский ελληνικά हिन्दी 中文 العربية",
    "ABCDEFGHIJKLMNOPQRSTUVWXYZ",
    "ÀÉÎÕÜ ß ẞ ı İ ﬆ",
    "Z̷̢̛͓a̵̞̎l̶̰͝g̴̣̈o̸͉͑",
    "ends in mark\u0301",
    "madeup word",
]


def normalisation_rules() -> str:
    """Return a small character map in the manner of nmt_nfkc, whose own is 230 kB."""
    rules = {
        **{(code,): (0x20,) for code in (0x9, 0xA, 0xC, 0xD, 0xA0, 0x1680, 0x2028, 0x2029)},
        **{(code,): (0x20,) for code in (*range(0x2000, 0x2010), 0x202F, 0x3000, 0xFEFF, 0xFFFD)},
        **{(code,): () for code in (*range(1, 9), 0xB, *range(0xE, 0x20), 0x7F, 0x8F, 0x9F)},
    }
    for code in (*range(0xFF01, 0xFFA0), *range(0xFB00, 0xFB07), 0xBD, 0xB2, 0x2122):
        rules[(code,)] = tuple(map(ord, unicodedata.normalize("NFKC", chr(code))))
    for letter in "aeiouAEIOU":
        for mark in "\u0300\u0301\u0302\u0308":
            composed = unicodedata.normalize("NFC", letter + mark)
            if len(composed) == 1:
                rules[(ord(letter), ord(mark))] = (ord(composed),)
    return "".join(
        f"{' '.join(f'{c:X}' for c in source)}\t{' '.join(f'{c:X}' for c in target)}\n"
        for source, target in rules.items()
    )


def train_model() -> sentencepiece.SentencePieceProcessor:
    """Train and write the small sentencepiece model."""
    model = io.BytesIO()
    # The model remembers the path of its rules: a relative one is the same everywhere.
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        rules = Path("rules.tsv")
        rules.write_text(normalisation_rules())
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS),
            model_writer=model,
            model_type="bpe",
            vocab_size=PIECES,
            character_coverage=1.0,
            normalization_rule_tsv=str(rules),
            minloglevel=2,
        )
    MODEL_FILE.write_bytes(model.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def write_vocabulary(processor: sentencepiece.SentencePieceProcessor) -> None:
    """Write a vocab.json of the model's pieces in another order, some missing, one made up."""
    pieces = [processor.id_to_piece(i) for i in range(3, len(processor))]
    random.Random(0).shuffle(pieces)
    words = ["<s>", "<pad>", "</s>", "<unk>", *pieces[:-20], "madeupword0000"]
    vocabulary = {word: i for i, word in enumerate(words)}
    VOCABULARY_FILE.write_text(json.dumps(vocabulary, ensure_ascii=False, indent=0) + "\n")


def published_nllb_tokens() -> dict[int, AddedToken]:
    """Return the added tokens in the order of the published tokenizer.json.

    Without that file transformers puts <mask> before the languages and so moves all their ids.
    """
    languages = [AddedToken(code, normalized=False, special=True) for code in NLLB_CODES]
    mask = AddedToken("<mask>", lstrip=True, normalized=True, special=True)
    return dict(enumerate([*languages, mask], start=PIECES + 1))


def tokenizers() -> dict[str, transformers.PreTrainedTokenizer]:
    """Return each reference tokenizer, with its languages set."""
    m2m100 = [f"__{code}__" for code in FAIRSEQ_LANGUAGE_CODES["m2m100"]]
    wmt21 = [f"__{code}__" for code in FAIRSEQ_LANGUAGE_CODES["wmt21"]]
    nllb = {
        "src_lang": "eng_Latn",
        "tgt_lang": "fra_Latn",
        "added_tokens_decoder": published_nllb_tokens(),
    }
    files = (str(VOCABULARY_FILE), str(MODEL_FILE))
    return {
        "nllb": NllbTokenizer(str(MODEL_FILE), **nllb),
        "nllb_legacy": NllbTokenizer(str(MODEL_FILE), legacy_behaviour=True, **nllb),
        "m2m100": M2M100Tokenizer(
            *files, src_lang="en", tgt_lang="fr", additional_special_tokens=m2m100
        ),
        "wmt21": M2M100Tokenizer(
            *files,
            src_lang="en",
            tgt_lang="de",
            language_codes="wmt21",
            num_madeup_words=0,
            additional_special_tokens=wmt21,
        ),
    }


def decodings(tokenizer, ids: list[int]) -> dict[str, str]:
    """Return the text of ids with special tokens left out and kept."""
    keywords = {"clean_up_tokenization_spaces": False}
    return {
        "skipped": tokenizer.decode(ids, skip_special_tokens=True, **keywords),
        "kept": tokenizer.decode(ids, skip_special_tokens=False, **keywords),
    }


def encoding_case(tokenizer, text: str) -> dict:
    """Return everything the reference makes of one text."""
    source = tokenizer(text).input_ids
    return {
        "text": text,
        "tokens": tokenizer.tokenize(text),
        "source": source,
        "target": tokenizer(text_target=text).input_ids,
        **decodings(tokenizer, source),
    }


def id_sequences(tokenizer) -> list[list[int]]:
    """Return sequences a model might emit though no text would."""
    size = len(tokenizer)
    draw = random.Random(1)
    fixed = [
        [],
        [2],
        [2, size - 2, 5, 2],
        [0, 1, 2, 3],
        [size - 2, size - 3, size - 4],
        [tokenizer.convert_tokens_to_ids("▁")],
        [size - 2, tokenizer.convert_tokens_to_ids("▁")],
        [tokenizer.convert_tokens_to_ids("▁"), size - 2],
        [size - 1, 9, size - 1],
    ]
    drawn = [[draw.randrange(size) for _ in range(draw.randrange(1, 14))] for _ in range(30)]
    often_special = [
        [draw.choice((draw.randrange(6), draw.randrange(size - 9, size))) for _ in range(8)]
        for _ in range(10)
    ]
    return fixed + drawn + often_special


def main() -> None:
    """Write all three files."""
    FOLDER.mkdir(exist_ok=True)
    write_vocabulary(train_model())
    lines = []
    for family, tokenizer in tokenizers().items():
        languages = {
            token: tokenizer.convert_tokens_to_ids(token)
            for token in tokenizer.additional_special_tokens
        }
        facts = {"family": family, "length": len(tokenizer), "language_ids": languages}
        lines.append(json.dumps(facts))
        lines += [
            json.dumps({"family": family, **encoding_case(tokenizer, text)})
            for text in (TEXTS if family in ("nllb", "m2m100") else TEXTS[::4])
        ]
        sequences = id_sequences(tokenizer)
        if "m2m100" in family:
            # Ids past the vocabulary: the model's made-up rows and one of transformers' own tests.
            sequences += [[len(tokenizer), 7, len(tokenizer) + 7], [144012]]
        lines += [
            json.dumps({"family": family, "ids": ids, **decodings(tokenizer, ids)})
            for ids in sequences
        ]
    versions = {
        "python": platform.python_version(),
        "sentencepiece": sentencepiece.__version__,
        "transformers": transformers.__version__,
    }
    body = ",\n".join(lines)
    (FOLDER / "goldens.json").write_text(
        f'{{"versions": {json.dumps(versions)},\n"cases": [\n{body}\n]}}\n'
    )


if __name__ == "__main__":
    main()
