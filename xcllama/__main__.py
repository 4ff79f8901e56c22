"""`python -m xcllama`: the command `xcllama`, for `accelerate launch -m xcllama train ...`."""

from xcllama.commands import main

if __name__ == "__main__":
    main()
