"""Experiments: one question, answered by many jobs. Torch-free; only the modules that a worker's child runs import scipy, matplotlib or
optuna.

    spec        what a user asks            findings    what is known, as stored and sent
    plan        arms, seeds and stages      statistics  the numbers (scipy)
    lifecycle   rows, moves, what is next   verdict     the sentence
    search      samplers, pruners (optuna)  pictures, report
"""
