"""How memeff is compiled: used by setup.py and pip, never installed."""
