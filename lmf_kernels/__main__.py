"""`python -m lmf_kernels` shows and checks the installation; with `build` it compiles the native kernels."""

import argparse
import sys


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m lmf_kernels",
        description="Shows what is installed and checks each backend against the reference.",
    )
    commands = parser.add_subparsers(dest="command", metavar="build")
    commands.add_parser("build", help="compile the native kernels into the installed package, for the present torch")
    if parser.parse_args().command == "build":
        from ._build.command import build

        print(f"lmf_kernels: {build()}")
    else:
        from ._installation import report

        lines, sound = report()
        print("\n".join(lines))
        sys.exit(0 if sound else 1)


if __name__ == "__main__":
    main()
