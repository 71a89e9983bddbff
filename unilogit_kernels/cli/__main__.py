"""`python -m unilogit_kernels.cli` is `unilogit`."""

from unilogit_kernels.cli.main import main

main()
