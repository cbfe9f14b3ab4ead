"""Cut the bundled protein sample from a set of Swiss-Prot representatives.

    python recipes/data/make_protein_sample.py --source PROTEINS_DIR [--output recipes/data/proteins]

PROTEINS_DIR holds ``swissprot2014_id50_train_72k.fasta.gz`` and ``swissprot2014_id50_validation.fasta.gz``, in an
order that says nothing about the proteins (md5 of the accession). Writes the first sequences of each as
``train.fasta.gz`` and ``validation.fasta.gz``, and ``NOTICE.md``. The sequences depend on the source alone.
"""

import argparse
import gzip
import io
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

PARTS = {  # part: (source file, residues at least)
    "train": ("swissprot2014_id50_train_72k.fasta.gz", 900_000),
    "validation": ("swissprot2014_id50_validation.fasta.gz", 100_000),
}
LINE_LENGTH = 60

NOTICE_HEAD = """# Where these sequences are from

Protein sequences of UniProtKB/Swiss-Prot, release 2014_01, from the UniProt Consortium, <https://www.uniprot.org>.
UniProt gives them under [CC BY 4.0](https://creativecommons.org/licenses/by/4.0/) today (in 2014: CC BY-ND 3.0); cite:
The UniProt Consortium, UniProt: the Universal Protein Knowledgebase, Nucleic Acids Research.

Changes: of the GO-annotated sequences (as in the Debian 12 package `metastudent-data` 2.0.1-8) the representatives of
clusters at 50 % identity and 80 % coverage were kept (`mmseqs easy-linclust --min-seq-id 0.5 -c 0.8 --cov-mode 0`), of
30 to 2,000 residues, in the order of the md5 of their accessions; these are the first of the training and of the
held-out part. No training sequence is in the same cluster as a held-out one. The header is the accession, and `size`
how many sequences the cluster has. Made by `recipes/data/make_protein_sample.py`.

| file | sequences | residues |
| --- | --- | --- |
"""


def read_fasta(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the header, without ``>``, and the sequence of each record of a gzipped FASTA file."""
    header, lines = "", []
    with gzip.open(path, "rt", encoding="ascii") as stream:
        for line in itertools.chain(stream, [">"]):
            if not line.startswith(">"):
                lines.append(line.strip())
                continue
            if header:
                yield header, "".join(lines)
            header, lines = line[1:].strip(), []


def cut(records: Iterator[tuple[str, str]], residues: int) -> list[tuple[str, str]]:
    """Take records until they have at least ``residues`` residues.

    Raises:
        ValueError: if all of them have less.
    """
    taken, total = [], 0
    for header, sequence in records:
        taken.append((header, sequence))
        total += len(sequence)
        if total >= residues:
            return taken
    raise ValueError(f"the source has {total:,} residues, {residues:,} are wanted")


def write_fasta(path: Path, records: list[tuple[str, str]]) -> None:
    """Write a gzipped FASTA file without a time or a name in its header, so that it can be made again."""
    text = io.StringIO()
    for header, sequence in records:
        text.write(f">{header}\n")
        for start in range(0, len(sequence), LINE_LENGTH):
            text.write(sequence[start : start + LINE_LENGTH] + "\n")
    path.write_bytes(gzip.compress(text.getvalue().encode("ascii"), compresslevel=9, mtime=0))


def make_sample(source: Path, output: Path) -> None:
    """Write the sample and its notice below ``output``.

    Raises:
        FileNotFoundError: if a file is missing below ``source``.
        ValueError: if a file holds too little.
    """
    output.mkdir(parents=True, exist_ok=True)
    rows = []
    for part, (name, residues) in PARTS.items():
        records = cut(read_fasta(source / name), residues)
        write_fasta(output / f"{part}.fasta.gz", records)
        total = sum(len(sequence) for _, sequence in records)
        rows.append(f"| {part}.fasta.gz | {len(records):,} | {total:,} |\n")
    (output / "NOTICE.md").write_bytes((NOTICE_HEAD + "".join(rows)).encode("utf-8"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="folder with the two files of proteins")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "proteins")
    arguments = parser.parse_args()
    for name, _ in PARTS.values():
        if not (arguments.source / name).is_file():
            parser.error(f"{arguments.source / name} does not exist")
    make_sample(arguments.source, arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
