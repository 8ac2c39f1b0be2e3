"""`python -m mobilellm` is the command `mobilellm`."""

from mobilellm.cli.main import main

if __name__ == "__main__":
    main()
