"""What an experiment's numbers say: statistics, the sentence of the verdict, pictures, the report, and the next values of a search.

Pure of jobs and stores: evidence in, findings out (`findings`). It imports scipy, matplotlib and optuna, so only a worker's child loads it;
what makes and steers the jobs of an experiment is `powergrad.jobs.experiments`.
"""
