"""`python -m qadapt` is the same as `qadapt`."""

from qadapt.cli.main import main

if __name__ == "__main__":
    main()
