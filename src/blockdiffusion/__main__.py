"""`python -m blockdiffusion`: the command `blockdiff` without its script."""

from blockdiffusion.cli import main

if __name__ == "__main__":
    main()
