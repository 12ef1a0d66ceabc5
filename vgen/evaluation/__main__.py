"""``python -m vgen.evaluation``: a table out of reports, two reports side by side."""

import argparse
from pathlib import Path

from vgen.errors import reported
from vgen.evaluation.compare import compare
from vgen.evaluation.table import write_table


def main() -> None:
    """Run one of the two commands; a mistake of the user ends with one line and status 2."""
    parser = argparse.ArgumentParser(prog="python -m vgen.evaluation", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    table = commands.add_parser("table", help="write table.csv and its pictures from reports")
    table.add_argument("folder", type=Path, help="where to write")
    table.add_argument("reports", type=Path, nargs="*", help="reports; those of the sub-folders if none are given")
    pair = commands.add_parser("compare", help="compare two reports, refusing unequal conventions")
    pair.add_argument("first", type=Path)
    pair.add_argument("second", type=Path)
    arguments = parser.parse_args()
    with reported():
        if arguments.command == "table":
            print(write_table(arguments.folder, arguments.reports or None))
            return
        for name, (first, second) in compare(arguments.first, arguments.second).items():
            print(f"{name:28} {first:12.5g} {second:12.5g} {second - first:+12.4g}")


if __name__ == "__main__":
    main()
