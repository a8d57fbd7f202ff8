"""What the tests of `temper data check` share: rows in which nothing is to be found, and a way to check rows."""

import random

from data_world import talk, write_rows

from data_preprocessing.audit.run import AuditOptions, audit
from data_preprocessing.build import build

WORDS = ("river", "stone", "paper", "window", "garden", "music", "bridge", "candle", "forest", "mirror", "ocean")


def prose(seed, words=14):
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS) + str(draw.randint(0, 999)) for _ in range(words))


def clean_rows(count=30):
    """Rows in which there is nothing to find."""
    return [talk(prose(2 * number), prose(2 * number + 1)) for number in range(count)]


def clean_pairs(count=60):
    draw = random.Random(0)
    return [
        {name: prose(3 * number + at, draw.randint(5, 30)) for at, name in enumerate(("prompt", "chosen", "rejected"))}
        for number in range(count)
    ]


def checker(folder, tokenizer):
    """Return what checks rows in `folder`, or with `built` a dataset built of them, and returns the report."""

    def run(rows, *, valid=(), built=False, tokenizer=tokenizer, **options):
        path = write_rows(folder / "rows.jsonl", rows)
        valid_path = [str(write_rows(folder / "valid.jsonl", valid))] if valid else []
        if built:
            build(path, folder / "built", tokenizer=tokenizer, overwrite=True)
            path = folder / "built"
        return audit([str(path)], tokenizer=tokenizer, valid=valid_path, options=AuditOptions(**options))

    return run


def only(report, code):
    """Return the one finding of a report."""
    assert [finding.code for finding in report.findings] == [code]
    return report.findings[0]


def lines_of(finding):
    return [int(place.split("rows.jsonl:")[1].split(":")[0].split(" ")[0]) for place in finding.places]
