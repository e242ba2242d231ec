"""How fast every form of a network is: `python -m repnet.bench`, explained in `docs/speed.md`."""
