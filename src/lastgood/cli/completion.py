"""lastgood completion: the script that a shell needs, revisions included."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script for a shell.

    \b
    bash: echo 'eval "$(lastgood completion bash)"' >> ~/.bashrc
    zsh:  echo 'eval "$(lastgood completion zsh)"' >> ~/.zshrc
    fish: lastgood completion fish > ~/.config/fish/completions/lastgood.fish
    """
    from lastgood.cli.main import cli

    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(cli, {}, "lastgood", "_LASTGOOD_COMPLETE").source())
