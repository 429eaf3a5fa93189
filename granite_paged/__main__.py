"""`python -m granite_paged` is `granite-paged`."""

from granite_paged.cli.main import main

if __name__ == "__main__":
    main()
