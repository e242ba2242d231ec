"""Train a network from configs/train.yaml; `python train.py --help` lists what can be chosen."""

from repnet.cli.train import main

if __name__ == "__main__":
    main()
