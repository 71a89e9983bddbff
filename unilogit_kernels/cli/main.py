"""The `unilogit` command. The commands themselves need the extra `unlearn`; this file does not."""

import sys

_EXTRA = (
    "typer",
    "rich",
    "click",
    "transformers",
    "accelerate",
    "regex",
    "rouge_score",
    "nltk",
    "scipy",
    "safetensors",
    "yaml",
)


def main() -> None:
    """Run the command line; exits with code 2 and a hint where the extra is not installed."""
    try:
        from unilogit_kernels.cli.app import app

        app()
    except ImportError as error:  # missing, or too old
        if error.name is None or error.name.partition(".")[0] not in _EXTRA:
            raise
        if sys.argv[1:2] == ["doctor"]:  # It says what is missing, so it runs without it.
            from unilogit_kernels.cli.doctor import main as doctor

            doctor(sys.argv[2:])
            return
        sys.exit(_missing(error))
    except SystemExit as end:
        processes = sys.modules.get("unilogit_kernels.unlearning.processes")
        if processes is not None:
            processes.leave(end.code if isinstance(end.code, int) else int(end.code is not None))
        raise


def _missing(error: ImportError) -> int:
    message = str(error)
    if isinstance(error, ModuleNotFoundError):
        message = (
            f"the package {error.name!r} is missing; run: pip install 'unilogit-kernels[unlearn]'"
        )
    print(f"unilogit: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
