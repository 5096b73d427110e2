"""Experiments: one question, answered by many jobs.

    spec        what a user asks
    changes     a clone's changes of it, by dotted name
    plan        arms, seeds, candidates and rungs; every job of it checked (pure)
    stages      which runs there are to be, and what tuning decides (pure)
    lifecycle   rows and moves: an experiment's jobs are made here, each once, and its next stage is decided here
    searches    how a search goes on
    news        what tells an experiment that a job of it has moved
    records     its row and its runs, as they are read
    results     what a job gave, kept with its run
    evidence    what its analysis is computed from
    analyses    when that is asked for, and how it comes to a worker
    answers     what becomes of a task's answer
    queries     an experiment as JSON, lists, files

The numbers are computed by `powergrad.experiments` in a worker's child; nothing here imports scipy.
"""
