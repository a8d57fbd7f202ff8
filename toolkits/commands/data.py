"""`temper data`: from rows of text to a dataset, and what is in it."""

import click

from .lazy import LazyGroup

COMMANDS = {
    "build": ("toolkits.commands.data_build", "build", "Turn rows of text into a dataset."),
    "show": ("toolkits.commands.data_view", "show", "Print a row: trained tokens in colour, context dimmed."),
}


@click.group(cls=LazyGroup, table=COMMANDS, context_settings={"help_option_names": ["-h", "--help"]})
def data() -> None:
    """Build a dataset and look at its rows."""
