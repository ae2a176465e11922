"""Shows the tiny model at work: held-out sentences through the command line, beside references.

Run ``make demo``. Exits with 1 when fewer than 90 % of the translations match.
"""

import subprocess
import sys

from recipes.tiny.evaluate import held_out_rows

DIRECTIONS = (
    ("eng_Latn", "fra_Latn"),
    ("fra_Latn", "rus_Cyrl"),
    ("deu_Latn", "zho_Hans"),
    ("zho_Hans", "eng_Latn"),
    ("spa_Latn", "hin_Deva"),
    ("rus_Cyrl", "swh_Latn"),
    ("hin_Deva", "ell_Grek"),
    ("swh_Latn", "por_Latn"),
)
ROWS = slice(4, 128, 16)
"""One held-out meaning of most kinds."""

COMMAND = ("moe_mt", "translate", "--split", "off")
"""Every line is one sentence; the splitter takes some abbreviated months for the end of one."""

NEEDED = 0.9


def main() -> int:
    """Translate, print and return the exit code."""
    rows = held_out_rows()[ROWS]
    matches = total = 0
    for src_lang, tgt_lang in DIRECTIONS:
        sources = [row[src_lang] for row in rows]
        print(f"\n$ moe-mt translate --split off -s {src_lang} -t {tgt_lang}")
        outputs = _translate(sources, src_lang, tgt_lang)
        for row, output in zip(rows, outputs, strict=True):
            reference = row[tgt_lang]
            matches += output == reference
            total += 1
            verdict = "" if output == reference else f"   (expected: {reference})"
            print(f"  {row[src_lang]}  →  {output}{verdict}")
    print(f"\n{matches} of {total} translations equal their reference.")
    return 0 if matches >= NEEDED * total else 1


def _translate(sources: list[str], src_lang: str, tgt_lang: str) -> list[str]:
    """Run the command on lines of text; its notes go where ours go."""
    command = [sys.executable, "-m", *COMMAND, "-q", "-s", src_lang, "-t", tgt_lang]
    text = "".join(f"{source}\n" for source in sources)
    done = subprocess.run(command, input=text, capture_output=True, encoding="utf-8", check=False)
    if done.returncode != 0:
        raise SystemExit(f"moe-mt translate failed with {done.returncode}:\n{done.stderr}")
    return done.stdout.split("\n")[:-1]


if __name__ == "__main__":
    sys.exit(main())
