"""Which rows are chosen: k-centre against brute force, splits against all pairs of rows, samples by group."""

import hashlib
import json
import random
import sys
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from data_world import talk, write_rows

from data_preprocessing.curate.diverse import DIMENSIONS, LENGTH, centres, embedded, features
from data_preprocessing.curate.facts import facts_of
from data_preprocessing.curate.pipeline import filter_rows
from data_preprocessing.curate.split import joined
from data_preprocessing.curate.step import Resources
from data_preprocessing.curate.steps import read_steps
from data_preprocessing.languages import language_of
from data_preprocessing.rows import Row
from toolkits.embedding import Embedder, _batches
from toolkits.foundation.errors import CheckpointError, DataError

READ = {"encoding": "utf-8", "merge_consecutive": False, "columns": ()}
WORDS = [f"{a}{b}{c}" for a in ("bra", "mon", "tel", "sur") for b in ("ki", "lo", "ve", "na") for c in ("st", "r", "m")]


def filtered(tmp_path, rows, *said, split=None, resources=None, name="out"):
    """Filter rows; return the report, and the numbers of the rows in each file that was written."""
    for number, row in enumerate(rows):
        row["number"] = number
    steps, parts = read_steps(said, split)
    source = write_rows(tmp_path / "in.jsonl", rows)
    target = tmp_path / f"{name}.jsonl"
    report = filter_rows([source], target, steps=steps, split=parts, resources=resources, overwrite=True)
    written = {}
    for file in report["output"]:
        lines = (tmp_path / file).read_text(encoding="utf-8").splitlines()
        written[file] = [json.loads(line)["number"] for line in lines]
    return report, written


# --------------------------------------------------------------------------------------------- k-centre


def greedy(points, keep):
    """The definition: after the first row, always the row whose nearest chosen one is farthest, the earlier of two."""
    points = np.array(points, np.int64)
    distances = ((points[:, None] - points[None]) ** 2).sum(-1).tolist()

    def distance(one, other):
        return distances[one][other]

    chosen = [0]
    while len(chosen) < keep:
        rest = [row for row in range(len(points)) if row not in chosen]
        chosen.append(max(rest, key=lambda row: (min(distance(row, centre) for centre in chosen), -row)))
    nearest = [
        row if row in chosen else min(chosen, key=lambda centre: (distance(row, centre), chosen.index(centre)))
        for row in range(len(points))
    ]
    return chosen, nearest


@pytest.mark.parametrize("case", ["random", "tied", "copies"])
def test_the_centres_are_those_of_the_definition(case):
    rng = np.random.default_rng(3)
    points = rng.normal(size=(60, DIMENSIONS))
    points *= LENGTH / np.linalg.norm(points, axis=1, keepdims=True)
    if case == "tied":
        points = rng.integers(-1, 2, size=(60, DIMENSIONS)) * (np.arange(DIMENSIONS) < 4) * 300
    if case == "copies":
        points[20:] = points[rng.integers(0, 20, 40)]
    points = np.rint(points).astype(np.int16)
    for keep in (1, 2, 25, 59):
        chosen, nearest = centres(points, keep=keep)
        expected, closest = greedy(points, keep)
        assert chosen.tolist() == expected
        assert nearest.tolist() == closest
    assert centres(points, keep=60)[0].tolist() == list(range(60)) == centres(points, keep=99)[1].tolist()


def test_features_are_exact_whole_numbers_that_never_change():
    texts = ["The cat sat on the mat.", "猫坐在垫子上。", "", "the of and", "кошка сидела", "cats " * 50_000]
    found = features(texts)
    assert found.dtype == np.int16 and found.shape == (6, DIMENSIONS)
    squares = (found.astype(np.int64) ** 2).sum(axis=1)
    assert squares[2] == squares[3] == 0, "little words say nothing"
    assert all(abs(np.sqrt(square) - LENGTH) < 10 for square in squares[[0, 1, 4, 5]])
    assert 4 * squares.max() < 2**24, "float32 counts exactly up to there"
    # Another choice of rows than last month's would be a surprise: these bytes are for ever.
    assert hashlib.sha256(found.tobytes()).hexdigest()[:16] == "5205f73e8a5363bd"


def test_features_say_what_a_text_is_about():
    about = [
        ("How do I bake bread at home?", "Bake the bread in a hot oven; home baking takes flour and yeast."),
        ("Which planet is the largest?", "Jupiter is the largest planet of the solar system, Saturn the second."),
        ("怎样在家里烤面包？", "在家里烤面包需要面粉、酵母和烤箱。"),
        ("太阳系最大的行星是哪个？", "木星是太阳系最大的行星，土星第二。"),
    ]
    vectors = features([text for pair in about for text in pair]).astype(float)
    alike = vectors @ vectors.T
    np.fill_diagonal(alike, -np.inf)
    assert alike.argmax(axis=1).tolist() == [1, 0, 3, 2, 5, 4, 7, 6]


def test_a_diverse_choice_is_that_of_the_features_and_names_what_stays(tmp_path):
    rng = random.Random(1)
    rows = [talk(" ".join(rng.choices(WORDS, k=6)), " ".join(rng.choices(WORDS, k=9))) for _ in range(50)]
    texts = ["\n".join(message["content"] for message in row["messages"]) for row in rows]
    chosen, nearest = greedy(features(texts), 12)
    _, written = filtered(tmp_path, rows, "diverse:keep=12")
    assert written["out.jsonl"] == sorted(chosen)
    rejects = [json.loads(line) for line in (tmp_path / "out.jsonl.rejects.jsonl").read_text().splitlines()]
    assert [entry["line"] - 1 for entry in rejects] == [row for row in range(50) if row not in chosen]
    for entry in rejects:
        assert entry["message"].endswith(f"in.jsonl:{nearest[entry['line'] - 1] + 1}")


def test_a_model_may_say_what_is_different(tmp_path):
    rng = np.random.default_rng(0)
    vectors = {f"text {number}": rng.normal(size=40) for number in range(30)}
    rows = [{"text": text} for text in vectors]
    seen = []

    def embed(texts):
        seen.extend(texts)
        return np.array([vectors[text] for text in texts], np.float32)

    resources = Resources(embed=embed, model="folder")
    report, written = filtered(tmp_path, rows, "diverse:keep=7", resources=resources)
    assert seen == list(vectors)
    assert written["out.jsonl"] == sorted(greedy(embedded(np.array(list(vectors.values()))), 7)[0])
    assert report["embedded_by"] == "folder"
    assert filtered(tmp_path, rows, "diverse:keep=7")[1] != written


def test_folding_dimensions_together_keeps_distances():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(30, 2000))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors[15:] = vectors[:15] + 0.3 * vectors[15:]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    folded = embedded(vectors).astype(float) / LENGTH
    off = [abs(np.dot(folded[a], folded[b]) - np.dot(vectors[a], vectors[b])) for a, b in combinations(range(30), 2)]
    assert np.mean(off) < 0.06 and max(off) < 0.25
    few = rng.normal(size=(4, 100))
    exact = few / np.linalg.norm(few, axis=1, keepdims=True)
    assert np.abs(embedded(few)[:, :100] / LENGTH - exact).max() < 1 / LENGTH


def test_the_model_embeds_as_transformers_does(tmp_path):
    torch = pytest.importorskip("torch")
    from data_world import write_tokenizer
    from transformers import AutoModel, AutoTokenizer, LlamaConfig, LlamaModel

    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3}
    torch.manual_seed(0)
    model = LlamaModel(LlamaConfig(vocab_size=512, num_key_value_heads=1, **sizes))
    model.save_pretrained(tmp_path / "model")
    write_tokenizer(tmp_path / "model")
    texts = ["hello world", "", "你好，世界。" * 30, "a", "the cat sat on the mat"]
    found = Embedder(tmp_path / "model")(texts)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    model = AutoModel.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert found.shape == (5, 24) and not found[1].any()
    for row in (0, 2, 3, 4):
        ids = torch.tensor([tokenizer(texts[row])["input_ids"]])
        with torch.no_grad():
            expected = model(ids).last_hidden_state[0].mean(0).numpy()
        np.testing.assert_allclose(found[row], expected, atol=1e-5)
    with pytest.raises(CheckpointError, match=r"--embed .*nothing: transformers cannot load it"):
        Embedder(tmp_path / "nothing")(["x"])


def test_batches_for_a_model_hold_each_row_once():
    rng = random.Random(0)
    encoded = [[1] * rng.choice([0, 1, 5, 700, 1024]) for _ in range(300)]
    batches = _batches(encoded)
    assert sorted(row for batch in batches for row in batch) == [row for row in range(300) if encoded[row]]
    assert max(len(batch) * max(len(encoded[row]) for row in batch) for batch in batches) <= 16 * 1024


# --------------------------------------------------------------------------------------------- splits


def grams(text):
    text = " ".join(text.lower().split())
    return {text[at : at + 5] for at in range(len(text) - 4)}


def families(rng, count):
    """Return texts in families of copies with a few letters changed; families have nothing in common."""
    rows = []
    for family in range(count):
        base = "".join(rng.choices("abcdefghijklmnopq     ", k=400)) + f" {family}"
        for _ in range(rng.choice([1, 1, 1, 2, 3, 9])):
            letters = list(base)
            for _ in range(rng.randint(0, 4)):
                letters[rng.randrange(len(letters))] = rng.choice("xyz")
            rows.append({"text": "".join(letters)})
    rng.shuffle(rows)
    return rows


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_pair_of_near_duplicates_lies_in_two_parts(tmp_path, seed):
    rows = families(random.Random(seed), 60)
    report, written = filtered(tmp_path, rows, split=f"valid=0.15,test=0.1,seed={seed}")
    part_of = {number: part for part, numbers in written.items() for number in numbers}
    assert sorted(part_of) == list(range(len(rows)))
    sets = [grams(row["text"]) for row in rows]
    near = [
        (a, b) for a, b in combinations(range(len(rows)), 2) if len(sets[a] & sets[b]) >= 0.8 * len(sets[a] | sets[b])
    ]
    assert len(near) > 100
    assert [pair for pair in near if part_of[pair[0]] != part_of[pair[1]]] == []
    # Without that care the same share of rows does leak: the test can fail.
    careless = {row: random.Random(row).random() < 0.15 for row in range(len(rows))}
    assert any(careless[a] != careless[b] for a, b in near)
    wanted = {"out.valid.jsonl": round(0.15 * len(rows)), "out.test.jsonl": round(0.1 * len(rows))}
    assert {part: len(written[part]) for part in wanted} == wanted
    assert report["split"]["largest_group"] >= 9


def test_rows_with_one_prompt_stay_together(tmp_path):
    rng = random.Random(4)
    prompts = [" ".join(rng.choices(WORDS, k=8)) for _ in range(30)]
    rows = [
        talk(prompts[n % 30] if n % 2 else prompts[n % 30].upper() + " ", f"answer {rng.random()}") for n in range(90)
    ]
    _, written = filtered(tmp_path, rows, split="valid=0.3")
    sides = [{number % 30 for number in part} for part in written.values()]
    assert len(sides) == 2 and not sides[0] & sides[1]
    assert len(written["out.valid.jsonl"]) == 27


def test_rows_with_nothing_in_common_are_split_by_the_seed_alone(tmp_path):
    rng = random.Random(5)
    rows = [{"text": " ".join(rng.choices(WORDS, k=40))} for _ in range(100)]
    drawn = [filtered(tmp_path, rows, split=f"valid=0.2,seed={seed}")[1]["out.valid.jsonl"] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert [len(one) for one in drawn] == [20, 20, 20]


def test_a_part_that_would_be_empty_is_refused(tmp_path):
    rows = [{"text": "the very same long text"} for _ in range(10)]
    with pytest.raises(
        DataError, match=r"valid=0.5: the part would be empty: 50.00% of 10 rows are 5.0, and the small"
    ):
        filtered(tmp_path, rows, split="valid=0.5")
    assert not (tmp_path / "out.jsonl").exists()


def test_groups_joined_are_those_of_a_search():
    rng = np.random.default_rng(0)
    for _ in range(20):
        labels = rng.integers(0, 25, (2, 40))
        one, other = ([int(np.flatnonzero(row == label)[0]) for label in row] for row in labels)
        expected = list(range(40))
        changed = True
        while changed:
            changed = False
            for a, b in combinations(range(40), 2):
                if (one[a] == one[b] or other[a] == other[b]) and expected[a] != expected[b]:
                    expected[a] = expected[b] = min(expected[a], expected[b])
                    changed = True
        assert joined(np.array(one), np.array(other)).tolist() == expected


# --------------------------------------------------------------------------------------------- samples


def test_a_sample_has_so_many_of_each_group(tmp_path):
    rng = random.Random(6)
    rows = [
        {"text": rng.choice(["the cat is on the mat", "猫坐在垫子上", "кошка сидела там"]) + f" {n}"} for n in range(90)
    ]
    for number, row in enumerate(rows):
        row["source"] = ["a", "b", "b", 7][number % 4]
    languages = Counter(language_of(row["text"]) for row in rows)
    assert set(languages) == {"en", "zh", "ru"} and min(languages.values()) > 11
    _, written = filtered(tmp_path, rows, "sample:per=language,n=11")
    assert Counter(language_of(rows[n]["text"]) for n in written["out.jsonl"]) == dict.fromkeys(languages, 11)
    _, written = filtered(tmp_path, rows, "sample:per=key.source,share=0.5")
    assert Counter(str(rows[n]["source"]) for n in written["out.jsonl"]) == {"a": 12, "b": 22, "7": 11}
    _, few = filtered(tmp_path, rows, "sample:n=500")
    assert few["out.jsonl"] == list(range(90))
    draws = [filtered(tmp_path, rows, f"sample:n=30,seed={seed}")[1]["out.jsonl"] for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert [len(draw) for draw in draws] == [30, 30, 30]


def test_a_sample_draws_every_row_as_often_as_any_other():
    facts = [facts_of(number, Row(1, {"text": "x"}), **READ) for number in range(20)]
    found = Counter()
    for seed in range(400):
        chooser = read_steps([f"sample:n=5,seed={seed}"])[0][0].start(Resources())
        chooser.remember(facts)
        found.update(np.flatnonzero(chooser.choose(np.arange(20)).kept).tolist())
    # 100 of 400 each, with a standard deviation of 9.
    assert len(found) == 20 and max(abs(count - 100) for count in found.values()) < 35
