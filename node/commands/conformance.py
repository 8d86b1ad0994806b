"""`cspine conformance`: the DICOM conformance statement of this very version."""

import click


@click.command()
def conformance() -> None:
    """Print the DICOM conformance statement, in Markdown."""
    from node.conformance import conformance_statement

    click.echo(conformance_statement(), nl=False)
