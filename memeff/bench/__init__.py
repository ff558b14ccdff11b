"""The measuring side of memeff: `memeff-bench` (cli.py), `memeff-tune` (tuning.py), `memeff-demo`
(demo.py).

Installed with the package, so that the figures a reader sees can be produced on the reader's own
machine. Nothing here is imported by `import memeff`.
"""
