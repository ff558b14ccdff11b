"""Logits that are not computed until somebody looks at them.

A patched head returns an object that stands for its logits. It remembers hidden states and weight,
and what happened since: scale, soft cap, upcast, views. Losses of it run memeff's kernels; what
they cannot express computes the logits, once, as the plain head would.

    state       the algebra: which function of hidden states and weight the logits are
    source      the head's weights, gathered where FSDP or ZeRO shard them
    node        a state and the plain calls that lead to it, to replay when logits are needed
    table       which torch function changes a state, or is computed from it, and how
    pointwise, views, reductions, losses, metadata      the rows of the table
    carriers    the two objects that code sees, and what happens when it calls a function of them
    head        nn.Linear that returns them
    patching    memeff.patch and memeff.unpatch
    report      what ran without logits, and what needed them

Each file uses only those above it (carriers the table, head the carriers).
"""
