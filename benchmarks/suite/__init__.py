"""How fast is decaf-lora, beside its peers and beside its bars? One file a row of docs/performance.md.

    python -m benchmarks.suite                # a cell or two of every row (`make bench` installs the peers first)
    python -m benchmarks.suite --full         # the whole grid
    python -m benchmarks.suite --only scale   # one row
    python -m benchmarks.suite --full --only local_steps --match model=vit agents=10    # some of its cells
    python -m benchmarks.suite --device cuda  # the same on a GPU, and what there is on a GPU only
    python -m benchmarks.suite --page         # docs/performance.md from the committed results

A row compares runs that take turns, so that a busy machine slows all of them alike, and keeps the ratio of every turn:
what is shown are medians and quartiles. Every cell runs in a process of its own. A cell that the results have for this
commit and device already is not measured again (unless --again), so a run that was stopped goes on.
"""
