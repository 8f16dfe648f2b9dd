"""``python -m w2s_train`` is the ``lightning`` command."""

from w2s_train.cli import main

if __name__ == "__main__":
    main()
