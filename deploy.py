"""Fold, verify and save a trained network; `python deploy.py --help` lists what can be chosen."""

from repnet.cli.deploy import main

if __name__ == "__main__":
    main()
