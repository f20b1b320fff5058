"""The regression gate: `pytest --qbench`, baselines, verdicts. Importing it imports nothing else."""
