"""ScaleSim's evaluation in the simulator: `python -m bench.scalesim --out DIR`."""
