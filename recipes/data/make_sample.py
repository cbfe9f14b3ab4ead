"""Cut the bundled text sample from the English ELTeC novels.

    python recipes/data/make_sample.py --source ELTEC_DIR [--output recipes/data/novels]

ELTEC_DIR holds ``train-2-of-3.jsonl.xz`` and ``validation.jsonl.xz``: one novel a line, with the fields id, title,
author, text. Writes ``train/*.txt`` (whole novels), ``validation/*.txt`` (openings of novels that training never sees)
and ``NOTICE.md``. The output depends on the source alone, byte for byte.
"""

import argparse
import json
import lzma
import sys
from pathlib import Path

SOURCE_REPOSITORY = "https://github.com/COST-ELTeC/ELTeC-eng"
SOURCE_COMMIT = "3db3b6738a836f0e1b276b6c9703e42f4297f978"
TRAIN_ARCHIVE = "train-2-of-3.jsonl.xz"
VALIDATION_ARCHIVE = "validation.jsonl.xz"

TRAIN_NOVELS = {
    "ENG18652_Carroll": "alices_adventures_in_wonderland.txt",
    "ENG18900_Doyle": "the_sign_of_four.txt",
    "ENG18920_Grossmith": "the_diary_of_a_nobody.txt",
    "ENG18951_Ward": "the_story_of_bessie_costrell.txt",
    "ENG19011_Jerome": "the_observations_of_henry.txt",
}
VALIDATION_NOVELS = {
    "ENG18500_Ainsworth": "auriol.txt",
    "ENG18661_Oliphant": "miss_marjoribanks.txt",
    "ENG19080_Chesterton": "the_man_who_was_thursday.txt",
}
VALIDATION_CHARACTERS = 45_000  # of each validation novel, cut back to the end of a paragraph

NOTICE_HEAD = f"""# Where these texts are from

English novels of 1840-1920 from the European Literary Text Collection (ELTeC), English collection:
<{SOURCE_REPOSITORY}>, commit `{SOURCE_COMMIT}`, level1 and level0.
The texts are in the public domain; the mark-up of the collection, which is not in these files, is CC BY 4.0 (COST
Action "Distant Reading for European Literary History", CA16204).

Plain text, UTF-8, one paragraph a line, otherwise unchanged. Made by `recipes/data/make_sample.py`.

| file | part | characters | title | author | ELTeC id |
| --- | --- | --- | --- | --- | --- |
"""


def read_novels(archive: Path) -> dict[str, dict[str, str]]:
    """Read an archive of novels, one JSON object a line, into a dictionary by ELTeC id.

    Raises:
        FileNotFoundError: if there is no such archive.
    """
    with lzma.open(archive, "rt", encoding="utf-8") as lines:
        return {novel["id"]: novel for novel in map(json.loads, lines)}


def opening(text: str, characters: int) -> str:
    """Return the whole paragraphs (lines) within the first ``characters`` characters of ``text``."""
    return text if len(text) <= characters else text[: text.rindex("\n", 0, characters)]


def write_novel(novel: dict[str, str], text: str, part: str, path: Path) -> str:
    """Write one text file with LF line ends and return its row of the notice."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = text.strip("\n") + "\n"
    path.write_bytes(text.encode("utf-8"))
    title = novel["title"].split(" : ")[0]
    author = novel["author"].rstrip(".")
    return f"| {path.parent.name}/{path.name} | {part} | {len(text):,} | {title} | {author} | {novel['id']} |\n"


def make_sample(source: Path, output: Path) -> None:
    """Write the sample and its notice below ``output``.

    Raises:
        FileNotFoundError: if an archive is missing below ``source``.
        KeyError: if an archive lacks one of the novels.
    """
    train, validation = read_novels(source / TRAIN_ARCHIVE), read_novels(source / VALIDATION_ARCHIVE)
    rows = [
        write_novel(train[novel], train[novel]["text"], "whole", output / "train" / name)
        for novel, name in TRAIN_NOVELS.items()
    ]
    for novel, name in VALIDATION_NOVELS.items():
        text = opening(validation[novel]["text"], VALIDATION_CHARACTERS)
        rows.append(write_novel(validation[novel], text, "opening", output / "validation" / name))
    (output / "NOTICE.md").write_bytes((NOTICE_HEAD + "".join(rows)).encode("utf-8"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="folder with the two archives of novels")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "novels")
    arguments = parser.parse_args()
    for name in (TRAIN_ARCHIVE, VALIDATION_ARCHIVE):
        if not (arguments.source / name).is_file():
            parser.error(f"{arguments.source / name} does not exist")
    make_sample(arguments.source, arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
