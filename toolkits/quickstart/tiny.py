"""A tiny Qwen2.5-shaped model with a tokenizer of its own, made in code: random weights, real files."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..generation.prompts import read_questions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen2Config

SAMPLE = Path(__file__).with_name("text_to_emoji.jsonl")
VOCABULARY = 901  # odd: no tensor parallel size divides it, so the padding of the embedding is exercised
SEED = 7
SYMBOL = r"[^\p{L}\p{N}\p{P}\s]"  # an emoji, or the mark that follows some of them
TURN_START, TURN_END, END_OF_TEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def write_tiny_checkpoint(folder: Path) -> int:
    """Write a HuggingFace checkpoint with random weights to `folder`; return its number of parameters."""
    import torch
    from transformers import Qwen2ForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = _tokenizer()
    torch.manual_seed(SEED)
    model = Qwen2ForCausalLM(_config(tokenizer))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # transformers starts biases at zero, where a lost one would not show
            torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def _config(tokenizer: "PreTrainedTokenizerFast") -> "Qwen2Config":
    from transformers import Qwen2Config

    return Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.05,  # the usual 0.02 is for wide models; this narrow one then takes five times as long
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )


def _tokenizer() -> "PreTrainedTokenizerFast":
    """Train a byte-level BPE of exactly VOCABULARY tokens on the sample."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    one_by_one = pre_tokenizers.Split(Regex(SYMBOL), "isolated")  # else a whole answer would become one token
    bpe.pre_tokenizer = pre_tokenizers.Sequence([one_by_one, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.decoder = decoders.ByteLevel()
    special = [END_OF_TEXT, TURN_START, TURN_END]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_texts(), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=TURN_END, pad_token=END_OF_TEXT, additional_special_tokens=[TURN_START]
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    assert len(tokenizer) == VOCABULARY, f"the sample gave {len(tokenizer)} tokens"
    return tokenizer


def _texts() -> Iterator[str]:
    for question in read_questions(SAMPLE):
        yield "\n".join(f"{turn.role}\n{turn.content}" for turn in question.messages)
        yield f"assistant\n{question.expected}"
