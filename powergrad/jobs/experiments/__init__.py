"""Experiments: one question, answered by many jobs.

    spec        what a user asks
    plan        arms, seeds and stages: which runs there are to be (pure)
    lifecycle   rows and moves: an experiment's jobs are made here, each once, and its next stage is decided here
    queries     an experiment as JSON, lists, the evidence that its analysis is computed from

The numbers are computed by `powergrad.experiments` in a worker's child; nothing here imports scipy.
"""
