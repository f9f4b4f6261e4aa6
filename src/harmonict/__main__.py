"""`python -m harmonict`."""

from harmonict.cli import main

if __name__ == "__main__":
    main()
