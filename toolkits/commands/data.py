"""`temper data`: from rows of text to a dataset, and what is in it."""

import click

from .lazy import LazyGroup

COMMANDS = {
    "build": ("toolkits.commands.data_build", "build", "Turn rows of text into a dataset."),
    "check": ("toolkits.commands.data_check", "check", "What would harm training, before it is paid for."),
    "filter": ("toolkits.commands.data_filter", "filter_command", "Keep the rows that pass steps, and split them."),
    "mix": ("toolkits.commands.data_filter", "mix", "Mix the rows of several files by weight."),
    "pairs": ("toolkits.commands.data_pairs", "pairs", "A model's answers beside corrected ones, as preference rows."),
    "show": ("toolkits.commands.data_view", "show", "Print rows, trained tokens in colour, or write them as a page."),
    "diff": ("toolkits.commands.data_view", "diff", "What changed between two builds of a dataset."),
    "convert": ("toolkits.commands.data_convert", "convert", "The doubled layout of older tools into ours, and back."),
}


@click.group(cls=LazyGroup, table=COMMANDS, context_settings={"help_option_names": ["-h", "--help"]})
def data() -> None:
    """Build a dataset and look at its rows."""
