"""``python -m rlquant`` is ``rlquant``."""

from rlquant.cli import main

main()
