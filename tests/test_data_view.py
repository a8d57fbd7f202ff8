"""`temper data show`: pieces whose texts are the decoded row, the ways of choosing rows, pairs and labels, the page."""

import io
import json
from html.parser import HTMLParser

import numpy as np
import pytest
from click.testing import CliRunner
from data_world import PIECES, SPECIALS, talk, write_rows, write_tokenizer
from tokenizers import Tokenizer, decoders

from data_preprocessing.build import build
from data_preprocessing.choose import Choice, choose
from data_preprocessing.dataset import open_dataset
from data_preprocessing.inspect import Entries, plain, show
from data_preprocessing.page import page
from data_preprocessing.pieces import decoded_pieces, visible
from data_preprocessing.tokenizer import load_tokenizer
from toolkits.commands.data import data
from toolkits.foundation.errors import DataError, UsageError

BAD_TEXT = "<script>alert(1)</script> & \"quoted\" 'it' </div> &lt; esc\x1b[31m \x9b \u202e x"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def chats(tmp_path_factory, tokenizer):
    rows = [talk(f"question {number}", "a" * (1 + number * 7 % 20)) for number in range(20)]
    rows[6] = talk("你好", "世界🙂 and more")
    rows[9] = talk("q", BAD_TEXT)
    rows[6]["messages"][1]["content"] += " caf\u00e9"
    return built(tmp_path_factory.mktemp("chats"), rows, tokenizer)


def built(folder, rows, tokenizer):
    build(write_rows(folder / "rows.jsonl", rows), folder / "out", tokenizer=tokenizer)
    return open_dataset(folder / "out")


def strips_a_space(folder):
    """Give a tokenizer the decoder of Llama's: the first space of what is decoded goes."""
    path = folder / "tokenizer.json"
    loaded = Tokenizer.from_file(str(path))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    loaded.decoder = decoders.Sequence(steps)
    path.write_text(loaded.to_str(), encoding="utf-8")


@pytest.mark.parametrize("kind", ["byte-level", "prepending", "first"])
def test_the_pieces_together_are_the_decoded_row(tmp_path, kind):
    folder = write_tokenizer(tmp_path / "tiny", kind=kind)
    if kind != "byte-level":
        strips_a_space(folder)
    loaded, rng = load_tokenizer(folder), np.random.default_rng(0)
    for _ in range(150):
        words = rng.choice([*PIECES, *SPECIALS, "é🙂", "的"], rng.integers(1, 30))
        ids = np.array(loaded.encoder.encode("".join(words), add_special_tokens=False).ids, np.int32)
        mask = rng.integers(0, 2, len(ids)).astype(np.uint8)
        pieces = decoded_pieces(loaded, ids, mask)
        assert "".join(piece.text for piece in pieces) == visible(
            loaded.encoder.decode(ids.tolist(), skip_special_tokens=False)
        )
        assert [place for piece in pieces for place in range(piece.first, piece.last + 1)] == list(range(len(ids)))
        for piece in pieces:
            assert {bool(mask[place]) for place in range(piece.first, piece.last + 1)} == {piece.trained}
            named = piece.text in SPECIALS and piece.first == piece.last
            assert piece.control == named


def test_a_character_in_two_pieces_is_in_the_second(tmp_path, tokenizer):
    loaded = load_tokenizer(tokenizer)
    ids = np.array(loaded.encoder.encode("a🙂b", add_special_tokens=False).ids)
    assert len(ids) == 6  # the emoji takes four tokens
    for border in (2, 3, 4):
        mask = (np.arange(6) >= border).astype(np.uint8)
        assert [piece.text for piece in decoded_pieces(loaded, ids, mask)] == ["a", "🙂b"]
    assert decoded_pieces(loaded, ids[:0], ids[:0]) == []


def test_a_token_that_the_tokenizer_lacks_is_no_gap_in_the_text(tokenizer):
    loaded = load_tokenizer(tokenizer)
    with pytest.raises(DataError, match=r"token 9999 is not one of the \d+ of .*tiny: the dataset was built with anot"):
        decoded_pieces(loaded, np.array([1, 9999]), np.zeros(2, np.uint8))


def test_what_steers_a_terminal_is_shown():
    assert visible("a\x1b[31m\r\n\t\x7f\x9b\u202ez") == "a␛[31m␍\n\t␡\\u009b\\u202ez"


# ------------------------------------------------------------------------------------------ choosing rows


def test_the_ways_of_choosing(chats):
    entries = Entries(chats)
    assert choose(entries, Choice()) == ([0], "")
    assert choose(entries, Choice(number=18, count=5)) == ([18, 19], "")
    lengths = chats.lengths.tolist()
    longest = sorted(range(20), key=lambda row: (-lengths[row], row))
    assert choose(entries, Choice(longest=True, count=4)) == (longest[:4], "")
    drawn, _ = choose(entries, Choice(random=True, seed=5, count=20))
    assert sorted(drawn) == list(range(20)) and drawn != list(range(20))
    assert choose(entries, Choice(random=True, seed=5, count=20))[0] == drawn
    assert choose(entries, Choice(random=True, seed=6, count=20))[0] != drawn
    assert len({choose(entries, Choice(random=True))[0][0] for _ in range(60)}) > 1  # another one each time


def test_a_search_looks_across_the_borders_of_tokens(chats):
    entries = Entries(chats)
    assert choose(entries, Choice(search="界🙂 a")) == ([6], "1 of 20 rows hold '界🙂 a'")
    rows = [row for row in range(20) if row not in (6, 9)]
    shown, said = choose(entries, Choice(search="user\nquestion", count=2))
    assert shown == rows[:2]
    assert said == f"18 of 20 rows hold 'user\\nquestion'; 2 shown, the next {', '.join(map(str, rows[2:12]))} ..."
    # The tokenizer composes characters, so what is searched for is composed too.
    assert choose(entries, Choice(search="cafe\u0301"))[0] == [6]
    with pytest.raises(DataError, match=r"none of its 20 rows holds 'Caf'; case and spaces count"):
        choose(entries, Choice(search="Caf"))


def test_a_search_finds_the_same_whatever_is_decoded_at_once(chats, monkeypatch):
    from data_preprocessing import choose as module

    monkeypatch.setattr(module, "TOKENS_AT_ONCE", 50)
    expected = [row for row in range(20) if row not in (6, 9)]
    assert choose(Entries(chats), Choice(search="question", count=99))[0] == expected


def test_two_ways_of_choosing_are_refused_together():
    with pytest.raises(UsageError, match=r"(?s)2 problems.*ROW and --longest and --search are 3 ways.*--seed is for"):
        Choice(number=0, longest=True, search="x", seed=3)
    with pytest.raises(UsageError, match="--search needs a text"):
        Choice(search="")


def test_entries_that_are_not_there(chats, tmp_path, tokenizer):
    with pytest.raises(UsageError, match=r"row 20: .* has rows 0 to 19"):
        choose(Entries(chats), Choice(number=20))
    with pytest.raises(UsageError, match="row -1"):
        show(chats, 0, -1, stream=io.StringIO())


# ------------------------------------------------------------------------------------- what other kinds show


def shown(dataset, *numbers):
    stream = io.StringIO()
    show(dataset, *numbers, stream=stream)
    return stream.getvalue()


def test_a_pair_shows_its_prompt_once_and_both_sides(tmp_path, tokenizer):
    prompt = [{"role": "user", "content": "q"}]
    pairs = [("good answer", "bad one"), ("the same start", "the same end"), ("x", "xy")]
    rows = [
        {
            "prompt": prompt,
            **{side: [{"role": "assistant", "content": text}] for side, text in zip(sides, pair, strict=True)},
        }
        for pair in pairs
        for sides in [("chosen", "rejected")]
    ]
    dataset = built(tmp_path, rows, tokenizer)
    assert len(dataset) == 6 and len(Entries(dataset)) == 3
    prompt = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    for number, (better, worse) in enumerate(pairs):
        entry = Entries(dataset)[number]
        texts = {section.title: plain(section.pieces) for section in entry.sections}
        answers = {"chosen": f"⟦{better}<|im_end|>⟧\n", "rejected": f"⟦{worse}<|im_end|>⟧\n"}
        assert texts == {"prompt": prompt, **answers}
        shared = int(np.argmax(dataset.mask(2 * number)))
        sides = dataset.lengths[2 * number] - shared, dataset.lengths[2 * number + 1] - shared
        assert entry.heading == f"pair {number} of 3: prompt {shared} tokens, chosen {sides[0]}, rejected {sides[1]}"
    assert "--- chosen ---\n⟦x<|im_end|>⟧\n\n--- rejected ---\n⟦xy<|im_end|>⟧" in shown(dataset, 2)
    with pytest.raises(UsageError, match=r"pair 3: .* has pairs 0 to 2"):
        shown(dataset, 3)
    assert choose(Entries(dataset), Choice(search="bad one"))[0] == [0]
    assert Entries(dataset).lengths.tolist() == dataset.lengths.reshape(3, 2).sum(1).tolist()


def test_labels_and_reference_answers_are_shown(tmp_path, tokenizer):
    (tmp_path / "labelled").mkdir()
    (tmp_path / "prompts").mkdir()
    labelled = [{**talk("q", "a"), "label": label} for label in (True, False)]
    dataset = built(tmp_path / "labelled", labelled, tokenizer)
    assert "label: good answer\n" in shown(dataset, 0) and "label: bad answer\n" in shown(dataset, 1)
    prompts = [{"messages": [{"role": "user", "content": "6 * 7?"}], "answer": "42\x1b[0m"}]
    dataset = built(tmp_path / "prompts", prompts, tokenizer)
    assert dataset.kind == "prompts" and dataset.num_trained_tokens == 0
    assert "answer: 42␛[0m\n" in shown(dataset, 0) and "⟦" not in shown(dataset, 0).replace("⟦trained⟧", "")


# ------------------------------------------------------------------------------------------------ the page


class Texts(HTMLParser):
    """Collects the text of every `div.text`, each character with the class of its span."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.rows, self.classes, self.tags, self.open = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append((tag, dict(attrs).get("class")))
        if dict(attrs).get("class") == "text":
            self.rows.append("")
            self.classes.append([])

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if ("div", "text") in self.open:
            self.rows[-1] += data
            self.classes[-1] += [self.open[-1][1]] * len(data)


def parsed(path):
    texts = Texts()
    texts.feed(path.read_text(encoding="utf-8"))
    texts.close()
    assert texts.open == []
    return texts


def run(*words):
    return CliRunner().invoke(data, [str(word) for word in words], catch_exceptions=True)


def test_the_page_says_what_the_rows_say(chats, tmp_path, tokenizer):
    path = tmp_path / "page.html"
    result = run("show", chats.path, 5, "-n", 5, "--html", path)
    assert result.exit_code == 0 and result.output == f"written {path}: 5 rows\n"
    found, encoder = parsed(path), load_tokenizer(tokenizer).encoder
    assert len(found.rows) == 5
    for row, text, classes in zip(range(5, 10), found.rows, found.classes, strict=True):
        tokens, mask = chats.tokens(row).tolist(), chats.mask(row)
        assert text == visible(encoder.decode(tokens, skip_special_tokens=False))
        trained = "".join(letter for letter, kind in zip(text, classes, strict=True) if kind.startswith("trained"))
        assert trained == visible(encoder.decode(chats.tokens(row)[mask == 1].tolist(), skip_special_tokens=False))
        control = "".join(letter for letter, kind in zip(text, classes, strict=True) if kind.endswith("control"))
        assert control == "<|im_start|><|im_end|>" * 2
    assert BAD_TEXT.replace("\x1b", "␛").replace("\x9b", "\\u009b").replace("\u202e", "\\u202e") in found.rows[4]


def test_the_page_loads_and_runs_nothing(chats, tmp_path):
    path = tmp_path / "page.html"
    assert run("show", chats.path, 9, "--html", path).exit_code == 0
    found = parsed(path)
    assert {tag for tag, _ in found.tags} == {
        *("html", "head", "meta", "title", "style", "body", "h1", "p", "span", "article", "h2", "div")
    }
    attributes = {name for _, attrs in found.tags for name in attrs}
    assert attributes == {"charset", "http-equiv", "content", "class", "title", "dir"}
    text = path.read_text(encoding="utf-8")
    assert "default-src 'none'" in text and "://" not in text and "url(" not in text


def test_a_title_and_a_note_are_escaped(tmp_path, tokenizer):
    prompts = [{"messages": [{"role": "user", "content": "q"}], "answer": "</p><b>x"}]
    text = page("<b>", [Entries(built(tmp_path, prompts, tokenizer))[0]])
    assert "<b>" not in text and "&lt;/p&gt;&lt;b&gt;x" in text


def test_a_page_is_not_overwritten_unless_asked(chats, tmp_path):
    path = tmp_path / "page.html"
    path.write_text("mine")
    result = run("show", chats.path, "--html", path)
    assert isinstance(result.exception, UsageError) and "output exists already" in str(result.exception)
    assert path.read_text() == "mine"
    assert run("show", chats.path, "--html", path, "--overwrite").exit_code == 0 and len(parsed(path).rows) == 1
    result = run("show", chats.path, "--html", tmp_path / "nowhere" / "page.html")
    assert isinstance(result.exception, UsageError) and "its folder is not there" in str(result.exception)


def test_the_command_chooses(chats):
    assert run("show", chats.path).output.startswith("row 0 of 20")
    assert run("show", chats.path, "--search", "世界").stdout.startswith("1 of 20 rows hold '世界'\nrow 6 of 20")
    result = run("show", chats.path, "--search", "nowhere")
    assert isinstance(result.exception, DataError) and result.exception.exit_code == 3
    assert isinstance(run("show", chats.path, 3, "--random").exception, UsageError)
    assert (
        run("show", chats.path, "--random", "--seed", 3).output
        == run("show", chats.path, "--random", "--seed", "3").output
    )
    assert json.dumps(run("show", chats.path, 2, "-n", 2).output).count("of 20") == 2
