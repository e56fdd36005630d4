"""`python -m roundel.cli`: the same as `roundel`."""

from . import main

if __name__ == "__main__":
    main()
