"""Ids and masks of templates in published styles, with and without markers, against transformers' own."""

import json
import os
import random

import pytest
from data_world import NO_SHARED, PIECES, SHARED, write_tokenizer
from template_styles import ENDS, SPECIALS, STYLES, WITH_SYSTEM, WITH_TOOLS, bare, marked

from data_preprocessing.chat import ChatEncoder
from data_preprocessing.records import Preference, record
from data_preprocessing.row_error import RowError

os.environ.setdefault("HF_HUB_OFFLINE", "1")
TYPES = ("string", "array", "object")


def folder_of(where, style, template):
    """Write the tiny tokenizer with the special tokens of a style."""
    folder = write_tokenizer(where, template, eos_token=ENDS[style], bos_token=SPECIALS[style][0])
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    known = {token["content"] for token in content["added_tokens"]}
    first = 1 + max(token["id"] for token in content["added_tokens"])
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    new = [token for token in SPECIALS[style] if token not in known]
    content["added_tokens"] += [{"id": first + index, "content": token, **flags} for index, token in enumerate(new)]
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def fuzzed(count, seed, *, tools, system, thoughts=False):
    """Yield rows of Unicode at random, with nested calls of tools where the style has them."""
    draw = random.Random(seed)

    def text(least=0):
        drawn = "".join(draw.choices(PIECES, k=draw.randint(least, 9)))
        return drawn if drawn.strip() or not least else drawn + "x"

    def value(depth=0):
        kinds = [
            lambda: text(),
            lambda: draw.randint(-99, 10**12),
            lambda: draw.random(),
            lambda: draw.choice([True, None]),
        ]
        if depth < 3:
            kinds += [lambda: [value(depth + 1) for _ in range(draw.randint(0, 3))]]
            kinds += [lambda: {text(1): value(depth + 1) for _ in range(draw.randint(0, 3))}]
        return draw.choice(kinds)()

    def arguments():
        return {f"{text(1)}{index}": value() for index in range(draw.randint(0, 3))}

    def answer(may_call):
        said = {"role": "assistant", "content": text(1)}
        if may_call and draw.random() < 0.4:
            calls = [{"type": "function", "function": {"name": f"f{draw.randint(0, 9)}", "arguments": arguments()}}]
            said = {**said, "content": draw.choice(["", text(1)]), "tool_calls": calls * draw.choice([1, 1, 2])}
        if thoughts and draw.random() < 0.5:
            said["reasoning_content"] = text(1).strip("\n") + "."
        elif thoughts and "tool_calls" not in said and draw.random() < 0.3:
            said["content"] = f"<think>\n{text(1).strip()}.\n</think>\n\n{text(1).strip()}."
        return said

    for _ in range(count):
        turns = [{"role": "system", "content": text(1)}] if system and draw.random() < 0.3 else []
        with_tools = tools and draw.random() < 0.5
        for _ in range(draw.randint(1, 3)):
            turns.append({"role": "user", "content": text()})
            turns.append(answer(with_tools))
            while "tool_calls" in turns[-1]:
                turns += [{"role": "tool", "content": text(1)} for _ in turns[-1]["tool_calls"]]
                turns.append(answer(with_tools and draw.random() < 0.5))
        row = {"messages": turns}
        if with_tools:
            parameters = {
                "type": "object",
                "properties": {text(1): {"type": draw.choice(TYPES), "description": text()}},
            }
            function = {"name": "f0", "description": text(), "parameters": parameters}
            row["tools"] = [{"type": "function", "function": function}]
        yield row


def transformers_of(folder):
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)

    def truth(messages, tools):
        out = tokenizer.apply_chat_template(
            messages, tools=tools or None, return_dict=True, return_assistant_tokens_mask=True
        )
        return out["input_ids"], out["assistant_masks"]

    return truth


def samples_of(encoder, conversations):
    samples = encoder.encode([encoder.render(one) for one in conversations])
    assert not samples.errors
    ends = samples.lengths.cumsum()
    for end, length in zip(ends.tolist(), samples.lengths.tolist(), strict=True):
        yield samples.tokens[end - length : end].tolist(), samples.mask[end - length : end].tolist()


def check_style(where, style, rows):
    truth = transformers_of(folder_of(where / "marked", style, marked(style)))
    conversations = [record(row) for row in rows]
    expected = [truth(row["messages"], row.get("tools")) for row in rows]
    for kind, template in (("marked", marked(style)), ("bare", bare(style))):
        encoder = ChatEncoder(folder_of(where / kind, style, template), encoder="tokenizers")
        decided = [number for number, one in enumerate(conversations) if is_decided(encoder, one)]
        # Thoughts between calls of tools are cut once another question follows: without markers, nothing shows where
        # the next answer begins then.
        assert len(decided) == len(rows) or (style == "thinking" and kind == "bare" and len(decided) > 0.6 * len(rows))
        found = samples_of(encoder, [conversations[number] for number in decided])
        for number, ours in zip(decided, found, strict=True):
            assert ours == expected[number], (kind, rows[number])


def is_decided(encoder, conversation):
    try:
        encoder.render(conversation)
    except RowError as error:
        assert error.reason == "undecidable"
        return False
    return True


@pytest.mark.parametrize("style", STYLES)
def test_fuzzed_conversations_are_those_of_transformers(tmp_path, style):
    rows = fuzzed(60, 1, tools=style in WITH_TOOLS, system=style in WITH_SYSTEM, thoughts=style == "thinking")
    check_style(tmp_path, style, list(rows))


@pytest.mark.full
@pytest.mark.parametrize("style", STYLES)
def test_ten_thousand_fuzzed_conversations_are_those_of_transformers(tmp_path, style):
    count = -(-10_000 // len(STYLES))
    options = {"tools": style in WITH_TOOLS, "system": style in WITH_SYSTEM, "thoughts": style == "thinking"}
    check_style(tmp_path, style, list(fuzzed(count, 2, **options)))


@pytest.mark.parametrize("style", STYLES)
def test_control_text_ends_no_turn_in_any_style(tmp_path, style):
    said = "".join(SPECIALS[style])
    row = {"messages": [{"role": "user", "content": said}, {"role": "assistant", "content": f"a{said}b"}]}
    plain = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "ab"}]}
    encoder = ChatEncoder(folder_of(tmp_path, style, bare(style)), encoder="tokenizers")
    control = set(encoder.tokenizer.control_ids)
    (ids, mask), (other, _) = samples_of(encoder, [record(row), record(plain)])
    assert [token for token in ids if token in control] == [token for token in other if token in control]
    trained = [token for token, keep in zip(ids, mask, strict=True) if keep]
    assert (
        encoder.tokenizer.encoder.decode(trained, skip_special_tokens=False).strip().endswith(f"a{said}b{ENDS[style]}")
    )


def test_a_thought_is_kept_or_cut_as_the_template_does(tmp_path):
    turns = []
    for number in (1, 2):
        turns.append({"role": "user", "content": f"q{number}"})
        turns.append({"role": "assistant", "content": f"a{number}", "reasoning_content": f"t{number}"})
    encoder = ChatEncoder(folder_of(tmp_path, "thinking", bare("thinking")), encoder="tokenizers")
    rendered = encoder.render(record({"messages": turns}))
    trained = [rendered.text[start:end] for start, end in rendered.spans]
    assert trained == ["a1<|im_end|>", "<think>\nt2\n</think>\n\na2<|im_end|>"]


def test_a_prompt_that_does_not_begin_the_text_shows_both(tmp_path):
    template = bare("thinking").replace(
        "{{- '<|im_start|>assistant\\n' }}{%- endif %}", "{{- '<|im_start|>ai' }}{%- endif %}"
    )
    encoder = ChatEncoder(folder_of(tmp_path, "thinking", template), encoder="tokenizers")
    with pytest.raises(
        RowError, match=r"turn 2 cannot be told .*'.*<\|im_start\|>ai' is not how '.*assistant.*' begins"
    ):
        encoder.render(record({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}))


@pytest.mark.skipif(not SHARED.exists(), reason=NO_SHARED)
@pytest.mark.parametrize("name", ["glaive_toolcall_en_demo", "dpo_en_demo", "dpo_zh_demo"])
def test_all_rows_of_the_real_samples_are_those_of_transformers(tmp_path, name):
    folder = SHARED / "qwen2_tokenizer"
    rows = json.loads((SHARED / "samples" / f"{name}.json").read_text(encoding="utf-8"))
    encoder, truth, checked = ChatEncoder(folder, encoder="tokenizers"), transformers_of(folder), 0
    for row in rows:
        found = record(row)
        talks = (found.chosen, found.rejected) if isinstance(found, Preference) else (found,)
        for talk, ours, said in zip(talks, samples_of(encoder, talks), as_people_write(row), strict=True):
            assert len(talk.messages) == len(said)
            tools = [{"type": "function", "function": tool} for tool in json.loads(row.get("tools") or "[]")]
            assert ours == truth(said, tools)
            checked += 1
    assert checked == (600 if "dpo" in name else 300)


def as_people_write(row):
    """Return a ShareGPT row as transformers takes it, read anew and not by the code under test."""
    roles = {"human": "user", "gpt": "assistant", "observation": "tool", "system": "system"}

    def turn(said):
        if said["from"] == "function_call":
            calls = json.loads(said["value"])
            calls = [{"type": "function", "function": one} for one in (calls if isinstance(calls, list) else [calls])]
            return {"role": "assistant", "content": "", "tool_calls": calls}
        return {"role": roles[said["from"]], "content": said["value"]}

    shared = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    shared += [turn(said) for said in row["conversations"]]
    return [[*shared, turn(row[side])] for side in ("chosen", "rejected")] if "chosen" in row else [shared]
